//! The guest's real-time clock, which the host compares with its own and adjusts.
//!
//! A container with CAP_SYS_TIME can set the clock too; the host corrects it within minutes. Time namespaces do not have a
//! real-time clock of their own.

use crate::sys;
use anyhow::{Context, Result};
use koya_protocol::messages::GuestClock;
use rustix::time::{ClockId, clock_gettime};

/// Limit for gradual adjustments, by which time never goes back and no timer is late: the kernel slews by 0.5 ms per second.
const SLEW_LIMIT_NS: i64 = 100_000_000;

const NANOSECONDS: i64 = 1_000_000_000;

pub(crate) fn read() -> GuestClock {
    let now = clock_gettime(ClockId::Realtime);
    GuestClock {
        now_ns: now
            .tv_sec
            .saturating_mul(NANOSECONDS)
            .saturating_add(now.tv_nsec),
        ..Default::default()
    }
}

/// A way to adjust the clock.
#[derive(Debug, PartialEq, Eq)]
enum Move {
    /// By this many microseconds, gradually.
    Slew(i64),
    /// By seconds and nanoseconds; only the seconds may be negative.
    Step(i64, i64),
}

impl Move {
    fn by(ns: i64) -> Self {
        match ns.unsigned_abs() <= SLEW_LIMIT_NS.unsigned_abs() {
            true => Self::Slew(ns / 1000),
            false => Self::Step(ns.div_euclid(NANOSECONDS), ns.rem_euclid(NANOSECONDS)),
        }
    }
}

/// Adjusts the clock. A gradual adjustment in progress is cancelled.
pub(crate) fn adjust(by_ns: i64) -> Result<()> {
    let moved = match Move::by(by_ns) {
        Move::Slew(microseconds) => sys::slew_clock(microseconds),
        Move::Step(seconds, nanoseconds) => {
            sys::slew_clock(0).and_then(|()| sys::step_clock(seconds, nanoseconds))
        }
    };
    moved.context("cannot move the clock")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn little_is_slewed_and_much_is_a_step() {
        assert_eq!(Move::by(50_000_999), Move::Slew(50_000));
        assert_eq!(Move::by(-SLEW_LIMIT_NS), Move::Slew(-100_000));
        assert_eq!(Move::by(SLEW_LIMIT_NS + 1), Move::Step(0, 100_000_001));
        assert_eq!(Move::by(-300_000_000_001), Move::Step(-301, 999_999_999));
        let Move::Step(seconds, nanoseconds) = Move::by(i64::MIN) else {
            panic!()
        };
        assert!(seconds < 0 && (0..NANOSECONDS).contains(&nanoseconds));
    }
}
