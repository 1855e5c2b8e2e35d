//! Resources shared by containers: created for the first user, released with the last.

use crate::sync::lock;
use std::collections::HashMap;
use std::hash::Hash;
use std::ops::Deref;
use std::sync::{Arc, Mutex};

/// Shared values by key.
///
/// Creating and releasing a value takes as long as the guest needs, possibly minutes: only users of the same key wait for
/// it.
pub(crate) struct RefCountedMap<K, V>(Mutex<HashMap<K, Slot<V>>>);

type Slot<V> = Arc<Mutex<Counted<V>>>;

struct Counted<V> {
    value: Option<Arc<V>>,
    users: usize,
}

/// A reference to a shared value, to be [given back](Self::release).
pub(crate) struct Ref<V> {
    slot: Slot<V>,
    value: Arc<V>,
}

impl<V> Ref<V> {
    /// Drops the reference; `end`s the value if it was the last.
    ///
    /// # Errors
    ///
    /// The error from `end`. The value is kept then, for the next user.
    pub(crate) fn release<E>(self, end: impl FnOnce(&V) -> Result<(), E>) -> Result<(), E> {
        let mut held = lock(&self.slot);
        held.users -= 1;
        if held.users == 0 {
            end(&self.value)?;
            held.value = None;
        }
        Ok(())
    }
}

impl<V> Deref for Ref<V> {
    type Target = V;

    fn deref(&self) -> &V {
        &self.value
    }
}

impl<K, V> Default for RefCountedMap<K, V> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<K: Eq + Hash, V> RefCountedMap<K, V> {
    /// Returns the value for a key, and creates it if missing.
    ///
    /// # Errors
    ///
    /// The error from `make`.
    pub(crate) fn take<E>(&self, key: K, make: impl FnOnce() -> Result<V, E>) -> Result<Ref<V>, E> {
        let slot = {
            let mut places = lock(&self.0);
            // A place without other references cannot be locked by anyone else.
            places.retain(|_, slot| Arc::strong_count(slot) > 1 || lock(slot).value.is_some());
            let new = || {
                Arc::new(Mutex::new(Counted {
                    value: None,
                    users: 0,
                }))
            };
            places.entry(key).or_insert_with(new).clone()
        };
        let mut held = lock(&slot);
        let value = match &held.value {
            Some(value) => value.clone(),
            None => Arc::new(make()?),
        };
        held.value = Some(value.clone());
        held.users += 1;
        drop(held);
        Ok(Ref { slot, value })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::convert::Infallible;
    use std::sync::mpsc;
    use std::thread;

    type Numbers = RefCountedMap<&'static str, u32>;

    fn take(numbers: &Numbers, key: &'static str, number: u32) -> Ref<u32> {
        numbers
            .take(key, || Ok::<_, Infallible>(number))
            .unwrap_or_else(|never| match never {})
    }

    #[test]
    fn the_first_makes_it_and_the_last_ends_it() {
        let numbers = Numbers::default();
        let (one, two) = (take(&numbers, "a", 1), take(&numbers, "a", 2));
        assert_eq!((*one, *two, *take(&numbers, "b", 3)), (1, 1, 3));
        let mut ended = Vec::new();
        for used in [one, two] {
            let end = |number: &u32| {
                ended.push(*number);
                Ok::<_, Infallible>(())
            };
            used.release(end).unwrap();
        }
        assert_eq!(ended, [1]);
        assert_eq!(*take(&numbers, "a", 4), 4);
    }

    #[test]
    fn one_that_does_not_end_stays() {
        let numbers = Numbers::default();
        let refused = take(&numbers, "a", 1).release(|_| Err("stuck"));
        assert_eq!(refused, Err("stuck"));
        let again = take(&numbers, "a", 2);
        assert_eq!(*again, 1);
        assert_eq!(again.release(|_| Ok::<_, &str>(())), Ok(()));
        assert_eq!(*take(&numbers, "a", 3), 3);
    }

    #[test]
    fn one_that_cannot_be_made_leaves_nothing() {
        let numbers = Numbers::default();
        assert!(numbers.take("a", || Err("broken")).is_err());
        assert_eq!(*take(&numbers, "b", 1), 1);
        assert_eq!(lock(&numbers.0).len(), 1);
    }

    #[test]
    fn a_slow_end_holds_up_nobody_else() {
        let numbers = Numbers::default();
        let slow = take(&numbers, "slow", 1);
        let (reached, is_reached) = mpsc::channel();
        let (go, may_go) = mpsc::channel::<()>();
        thread::scope(|scope| {
            scope.spawn(move || {
                let end = |_: &u32| {
                    reached.send(()).ok();
                    may_go.recv()
                };
                slow.release(end).unwrap();
            });
            is_reached.recv().unwrap();
            let other = take(&numbers, "other", 2);
            other.release(|_| Ok::<_, Infallible>(())).unwrap();
            go.send(()).unwrap();
        });
        assert_eq!(*take(&numbers, "slow", 3), 3);
    }
}
