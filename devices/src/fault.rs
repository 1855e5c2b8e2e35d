//! Log messages about misbehaving guests, each up to a limit per process.

/// Logs a guest's misbehavior as a warning.
macro_rules! guest_fault {
    ($($text:tt)*) => {{
        static SEEN: koya_host::limited::Warnings = koya_host::limited::Warnings::new();
        SEEN.warn(format_args!($($text)*));
    }};
}
pub(crate) use guest_fault;

/// Logs what a guest may also do by right, for debugging.
macro_rules! guest_detail {
    ($($text:tt)*) => {{
        static SEEN: koya_host::limited::Warnings = koya_host::limited::Warnings::new();
        SEEN.debug(format_args!($($text)*));
    }};
}
pub(crate) use guest_detail;
