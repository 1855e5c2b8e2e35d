//! Log messages about misbehaving guests.

use std::sync::atomic::{AtomicU32, Ordering};

/// Number of messages logged for one kind of guest fault; a guest can cause any number of faults.
const MAX_MESSAGES: u32 = 20;

/// Implements [`guest_fault`] and [`guest_detail`]: logs a message, up to a limit per process.
pub(crate) fn log_limited(level: log::Level, seen: &AtomicU32, text: std::fmt::Arguments<'_>) {
    match seen.fetch_add(1, Ordering::Relaxed) {
        0..MAX_MESSAGES => log::log!(level, "{text}"),
        MAX_MESSAGES => log::log!(level, "{text}; more of these are not shown"),
        _ => {}
    }
}

/// Logs a guest's misbehavior as a warning, up to a limit.
macro_rules! guest_fault {
    ($($text:tt)*) => {{
        static SEEN: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        crate::fault::log_limited(log::Level::Warn, &SEEN, format_args!($($text)*));
    }};
}
pub(crate) use guest_fault;

/// Logs what a guest may also do by right, for debugging, up to a limit.
macro_rules! guest_detail {
    ($($text:tt)*) => {{
        static SEEN: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        crate::fault::log_limited(log::Level::Debug, &SEEN, format_args!($($text)*));
    }};
}
pub(crate) use guest_detail;
