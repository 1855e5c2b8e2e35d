//! Log messages about misbehaving guests.

use std::sync::atomic::{AtomicU32, Ordering};

/// Number of warnings logged for one kind of guest fault; a guest can cause any number of faults.
const MAX_WARNINGS: u32 = 20;

/// Implements [`guest_fault`]: logs a warning, up to a limit per process.
pub(crate) fn warn_limited(seen: &AtomicU32, text: std::fmt::Arguments<'_>) {
    match seen.fetch_add(1, Ordering::Relaxed) {
        0..MAX_WARNINGS => log::warn!("{text}"),
        MAX_WARNINGS => log::warn!("{text}; more of these are not shown"),
        _ => {}
    }
}

/// Logs a guest's misbehavior as a warning, up to a limit.
macro_rules! guest_fault {
    ($($text:tt)*) => {{
        static SEEN: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        crate::fault::warn_limited(&SEEN, format_args!($($text)*));
    }};
}
pub(crate) use guest_fault;
