//! Log messages whose number a guest determines.

use log::Level;
use std::fmt::Arguments;
use std::sync::atomic::{AtomicU32, Ordering};

/// A message with a limit, for events that a guest can cause at will.
#[derive(Debug, Default)]
pub struct Warnings(AtomicU32);

/// Number of times that each message is logged.
const MAX_WARNINGS: u32 = 20;

impl Warnings {
    /// No message logged yet.
    pub const fn new() -> Self {
        Self(AtomicU32::new(0))
    }

    /// Logs a warning, up to the limit.
    pub fn warn(&self, text: Arguments<'_>) {
        self.log(Level::Warn, text);
    }

    /// Logs a message for debugging, up to the limit.
    pub fn debug(&self, text: Arguments<'_>) {
        self.log(Level::Debug, text);
    }

    fn log(&self, level: Level, text: Arguments<'_>) {
        // Saturates rather than wraps, which would start logging again.
        let count = |count: u32| Some(count.saturating_add(1));
        let before = self
            .0
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, count);
        match before.unwrap_or(u32::MAX) {
            0..MAX_WARNINGS => log::log!(level, "{text}"),
            MAX_WARNINGS => log::log!(level, "{text}; more of these are not shown"),
            _ => {}
        }
    }
}
