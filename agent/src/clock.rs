//! The guest's real time, which the host compares with its own and moves.
//!
//! A container with CAP_SYS_TIME can set the clock too; the host sets it back within minutes. There is one such
//! clock for all time namespaces.

use crate::sys;
use anyhow::{Context, Result};
use koya_protocol::messages::GuestClock;
use rustix::time::{ClockId, clock_gettime};

/// What is moved gradually, so that time never goes back and no timer is late: the kernel makes 0.5 ms of it in a
/// second.
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

/// How the clock is moved.
#[derive(Debug, PartialEq, Eq)]
enum Move {
    /// By so many microseconds, gradually.
    Slew(i64),
    /// By seconds and nanoseconds, of which only the former are negative.
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

/// Moves the clock. What a former call left to be moved gradually is forgotten.
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
