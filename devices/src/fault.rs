//! What a guest did wrong, in the log.

use std::sync::atomic::{AtomicU32, Ordering};

/// How often one kind of a guest's fault is logged; a guest can make as many as it likes.
const SHOWN_FAULTS: u32 = 20;

/// For [`guest_fault`]: a warning, until there were enough of them in this process.
pub(crate) fn warn_some(seen: &AtomicU32, text: std::fmt::Arguments<'_>) {
    match seen.fetch_add(1, Ordering::Relaxed) {
        0..SHOWN_FAULTS => log::warn!("{text}"),
        SHOWN_FAULTS => log::warn!("{text}; more of these are not shown"),
        _ => {}
    }
}

/// Logs what a guest did wrong, as a warning, but never without end.
macro_rules! guest_fault {
    ($($text:tt)*) => {{
        static SEEN: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        crate::fault::warn_some(&SEEN, format_args!($($text)*));
    }};
}
pub(crate) use guest_fault;
