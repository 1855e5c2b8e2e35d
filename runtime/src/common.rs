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
pub(crate) struct Common<K, V>(Mutex<HashMap<K, Place<V>>>);

type Place<V> = Arc<Mutex<Held<V>>>;

struct Held<V> {
    value: Option<Arc<V>>,
    users: usize,
}

/// A reference to a shared value, to be [given back](Self::give_back).
pub(crate) struct Used<V> {
    place: Place<V>,
    value: Arc<V>,
}

impl<V> Used<V> {
    /// Drops the reference; `end`s the value if it was the last.
    ///
    /// # Errors
    ///
    /// The error from `end`. The value is kept then, for the next user.
    pub(crate) fn give_back<E>(self, end: impl FnOnce(&V) -> Result<(), E>) -> Result<(), E> {
        let mut held = lock(&self.place);
        held.users -= 1;
        if held.users == 0 {
            end(&self.value)?;
            held.value = None;
        }
        Ok(())
    }
}

impl<V> Deref for Used<V> {
    type Target = V;

    fn deref(&self) -> &V {
        &self.value
    }
}

impl<K, V> Default for Common<K, V> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<K: Eq + Hash, V> Common<K, V> {
    /// Returns the value for a key, and creates it if missing.
    ///
    /// # Errors
    ///
    /// The error from `make`.
    pub(crate) fn take<E>(
        &self,
        key: K,
        make: impl FnOnce() -> Result<V, E>,
    ) -> Result<Used<V>, E> {
        let place = {
            let mut places = lock(&self.0);
            // A place without other references cannot be locked by anyone else.
            places.retain(|_, place| Arc::strong_count(place) > 1 || lock(place).value.is_some());
            let new = || {
                Arc::new(Mutex::new(Held {
                    value: None,
                    users: 0,
                }))
            };
            places.entry(key).or_insert_with(new).clone()
        };
        let mut held = lock(&place);
        let value = match &held.value {
            Some(value) => value.clone(),
            None => Arc::new(make()?),
        };
        held.value = Some(value.clone());
        held.users += 1;
        drop(held);
        Ok(Used { place, value })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::convert::Infallible;
    use std::sync::mpsc;
    use std::thread;

    type Numbers = Common<&'static str, u32>;

    fn take(numbers: &Numbers, key: &'static str, number: u32) -> Used<u32> {
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
            used.give_back(end).unwrap();
        }
        assert_eq!(ended, [1]);
        assert_eq!(*take(&numbers, "a", 4), 4);
    }

    #[test]
    fn one_that_does_not_end_stays() {
        let numbers = Numbers::default();
        let refused = take(&numbers, "a", 1).give_back(|_| Err("stuck"));
        assert_eq!(refused, Err("stuck"));
        let again = take(&numbers, "a", 2);
        assert_eq!(*again, 1);
        assert_eq!(again.give_back(|_| Ok::<_, &str>(())), Ok(()));
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
                slow.give_back(end).unwrap();
            });
            is_reached.recv().unwrap();
            let other = take(&numbers, "other", 2);
            other.give_back(|_| Ok::<_, Infallible>(())).unwrap();
            go.send(()).unwrap();
        });
        assert_eq!(*take(&numbers, "slow", 3), 3);
    }
}
