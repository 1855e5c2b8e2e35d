//! Token buckets that limit a device's bytes and operations per second.
//!
//! A bucket fills at a constant rate up to its size. A request may start while the bucket is not empty and
//! then takes its cost, if necessary on credit: a request larger than the bucket passes, and those after
//! it wait longer.

use serde::{Deserialize, Serialize};
use std::time::{Duration, Instant};

/// Maximum duration of one wait; then the bucket is checked again.
const MAX_WAIT: Duration = Duration::from_secs(60);

/// Configuration of one bucket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rate {
    /// Tokens (bytes or operations) added per second; 1 or more.
    pub per_second: u64,
    /// Tokens available at once to an idle device; 1 or more. Default: those of 0.1 s.
    #[serde(default)]
    pub burst: Option<u64>,
}

/// The limits of one device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RateLimits {
    /// Bytes. Default: no limit.
    #[serde(default)]
    pub bytes: Option<Rate>,
    /// Operations: requests to a disk, frames of a network. Default: no limit.
    #[serde(default)]
    pub operations: Option<Rate>,
}

/// The token buckets of a device.
#[derive(Debug)]
pub struct RateLimiter {
    bytes: Option<Bucket>,
    operations: Option<Bucket>,
}

#[derive(Debug)]
struct Bucket {
    size: f64,
    per_second: f64,
    tokens: f64,
    filled: Instant,
}

impl Bucket {
    fn new(rate: Rate, now: Instant) -> Self {
        let per_second = rate.per_second.max(1);
        let size = rate.burst.unwrap_or(per_second / 10).max(1) as f64;
        Self {
            size,
            per_second: per_second as f64,
            tokens: size,
            filled: now,
        }
    }

    /// Time to wait until a request may start.
    fn wait(&mut self, now: Instant) -> Option<Duration> {
        let passed = now.saturating_duration_since(self.filled).as_secs_f64();
        self.tokens = (self.tokens + passed * self.per_second).min(self.size);
        self.filled = now;
        // At least one whole token, or rounding errors would wake the device too early forever.
        let missing = 1.0_f64.min(self.size) - self.tokens;
        if missing <= 0.0 {
            return None;
        }
        let wait = Duration::try_from_secs_f64(missing / self.per_second);
        Some(
            wait.unwrap_or(MAX_WAIT)
                .clamp(Duration::from_micros(50), MAX_WAIT),
        )
    }
}

impl RateLimiter {
    /// Full buckets.
    pub fn new(limits: RateLimits) -> Self {
        let now = Instant::now();
        Self {
            bytes: limits.bytes.map(|rate| Bucket::new(rate, now)),
            operations: limits.operations.map(|rate| Bucket::new(rate, now)),
        }
    }

    /// A full bucket for operations alone.
    pub fn of_operations(rate: Rate) -> Self {
        Self::new(RateLimits {
            operations: Some(rate),
            bytes: None,
        })
    }

    /// Charges for an operation without bytes, if one may start at `now`; otherwise returns the time to wait.
    pub fn start(&mut self, now: Instant) -> Option<Duration> {
        let wait = self.wait(now);
        if wait.is_none() {
            self.charge(0);
        }
        wait
    }

    /// `None` if a request may start at `now`, otherwise the time to wait.
    pub fn wait(&mut self, now: Instant) -> Option<Duration> {
        if !self.limits() {
            return None;
        }
        let buckets = [&mut self.bytes, &mut self.operations];
        let waits = buckets.into_iter().flatten();
        waits.filter_map(|bucket| bucket.wait(now)).max()
    }

    /// Charges for a request of `bytes` that has started.
    pub fn charge(&mut self, bytes: u64) {
        if let Some(bucket) = &mut self.bytes {
            bucket.tokens -= bytes as f64;
        }
        if let Some(bucket) = &mut self.operations {
            bucket.tokens -= 1.0;
        }
    }

    /// Whether there is any limit.
    pub fn limits(&self) -> bool {
        self.bytes.is_some() || self.operations.is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes that pass in `seconds` with an endless supply of requests of `size`.
    fn passed(limits: RateLimits, size: u64, seconds: u64) -> u64 {
        let mut limiter = RateLimiter::new(limits);
        let start = Instant::now();
        let (mut now, mut bytes) = (start, 0);
        while now < start + Duration::from_secs(seconds) {
            match limiter.wait(now) {
                Some(wait) => now += wait,
                None => {
                    limiter.charge(size);
                    bytes += size;
                }
            }
        }
        bytes
    }

    #[test]
    fn a_rate_holds_whatever_the_size_of_requests() {
        let bytes = Some(Rate {
            per_second: 1_000_000,
            burst: None,
        });
        for size in [1, 512, 4096, 1 << 20] {
            let limits = RateLimits {
                bytes,
                operations: None,
            };
            let got = passed(limits, size, 20);
            // Twenty seconds, the burst, and one request on credit.
            let most = 20_100_000 + size;
            assert!((19_000_000..=most).contains(&got), "{size}: {got}");
        }
    }

    #[test]
    fn the_slower_of_two_limits_counts() {
        let limits = RateLimits {
            bytes: Some(Rate {
                per_second: 1 << 30,
                burst: None,
            }),
            operations: Some(Rate {
                per_second: 10,
                burst: Some(1),
            }),
        };
        let got = passed(limits, 4096, 10) / 4096;
        assert!((99..=102).contains(&got), "{got}");
    }

    #[test]
    fn no_limit_never_waits() {
        let mut limiter = RateLimiter::new(RateLimits::default());
        limiter.charge(u64::MAX);
        assert_eq!(limiter.wait(Instant::now()), None);
        assert!(!limiter.limits());
    }

    /// All small buckets, and all sequences of three requests, compared with integer arithmetic.
    #[test]
    fn buckets_hold_what_whole_numbers_say() {
        /// A token is a thousand of these, so that a millisecond adds whole ones.
        const TOKEN: i64 = 1000;
        /// Maximum difference between the two after a few roundings.
        const DRIFT: i64 = 4;
        let (sizes, delays) = (0..=6u64, [0u64, 100, 300, 1000]);
        let uses: Vec<(u64, u64)> = sizes
            .flat_map(|size| delays.map(|delay| (size, delay)))
            .collect();
        let mut cases = 0;
        let start = Instant::now();
        for (per_second, burst) in (1..=6u64).flat_map(|rate| (1..=5u64).map(move |b| (rate, b))) {
            let rate = Rate {
                per_second,
                burst: Some(burst),
            };
            let most = burst as i64 * TOKEN;
            for number in 0..uses.len().pow(3) {
                let mut bucket = Bucket::new(rate, start);
                let (mut now, mut tokens, mut left) = (start, most, number);
                for _ in 0..3 {
                    let (size, delay) = uses[left % uses.len()];
                    left /= uses.len();
                    now += Duration::from_millis(delay);
                    tokens = most.min(tokens + (delay * per_second) as i64);
                    match bucket.wait(now) {
                        None => assert!(tokens >= TOKEN - DRIFT, "{rate:?}: {tokens}"),
                        Some(wait) => {
                            assert!(tokens <= TOKEN + DRIFT, "{rate:?}: {tokens}");
                            let missing = (TOKEN - tokens).max(0) as u64;
                            let enough = Duration::from_millis(missing.div_ceil(per_second) + 1);
                            assert!(wait <= enough, "{rate:?}: {wait:?} for {missing}");
                            // After that wait, the request may start.
                            now += wait + Duration::from_micros(1);
                            assert_eq!(bucket.wait(now), None);
                            let passed = (wait.as_secs_f64() * 1e3 * per_second as f64) as i64;
                            tokens = most.min(tokens + passed);
                        }
                    }
                    bucket.tokens -= size as f64;
                    tokens -= size as i64 * TOKEN;
                    let drift = bucket.tokens * TOKEN as f64 - tokens as f64;
                    assert!(drift.abs() < DRIFT as f64, "{rate:?}: {drift}");
                    cases += 1;
                }
            }
        }
        println!("{cases} requests to {} buckets", 6 * 5);
    }
}
