//! Locks of this crate.

pub(crate) use koya_vmm::host::sync::{lock, wait};
use std::sync::{Condvar, Mutex};

/// Limits the number of concurrent operations.
#[derive(Default)]
pub(crate) struct Turns {
    taken: Mutex<usize>,
    changed: Condvar,
}

impl Turns {
    /// Waits until fewer than `limit` operations run, and runs `work`.
    pub(crate) fn take<T>(&self, limit: usize, work: impl FnOnce() -> T) -> T {
        let mut taken = lock(&self.taken);
        while *taken >= limit {
            taken = wait(&self.changed, taken);
        }
        *taken += 1;
        drop(taken);
        let done = work();
        *lock(&self.taken) -= 1;
        self.changed.notify_one();
        done
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn only_so_many_have_a_turn_at_a_time() {
        let turns = Turns::default();
        let (now, most) = (Mutex::new(0_usize), Mutex::new(0_usize));
        std::thread::scope(|scope| {
            for _ in 0..20 {
                scope.spawn(|| {
                    turns.take(3, || {
                        *lock(&now) += 1;
                        let seen = *lock(&now);
                        let mut most = lock(&most);
                        *most = seen.max(*most);
                        drop(most);
                        std::thread::sleep(Duration::from_millis(2));
                        *lock(&now) -= 1;
                    });
                });
            }
        });
        assert!((1..=3).contains(&*lock(&most)));
        assert_eq!(*lock(&turns.taken), 0);
    }
}
