//! The same request to several containers: each may take its whole time limit.

use super::Outcome;
use std::thread::Builder;

/// Calls `ask` with each name in a thread of its own, and `each` with the results, in order.
pub(super) fn at_once(
    names: &[String],
    ask: impl Fn(&str) -> Outcome + Sync,
    mut each: impl FnMut(&str, Outcome),
) {
    let ask = &ask;
    std::thread::scope(|scope| {
        let start = |name| Builder::new().spawn_scoped(scope, move || ask(name));
        let threads: Vec<_> = names.iter().map(|name| (name, start(name))).collect();
        for (name, thread) in threads {
            let result = match thread.map(|thread| thread.join()) {
                Ok(Ok(result)) => result,
                Ok(Err(panic)) => std::panic::resume_unwind(panic),
                // No further threads can be created: it has its turn now.
                Err(_) => ask(name),
            };
            each(name, result);
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Barrier;

    #[test]
    fn all_are_asked_before_the_first_answers() {
        let names = ["a", "b", "c"].map(String::from);
        let all = Barrier::new(names.len());
        let mut results = Vec::new();
        let ask = |name: &str| {
            all.wait();
            Ok(name.as_bytes()[0])
        };
        at_once(&names, ask, |name, result| {
            results.push((name.to_owned(), result.unwrap()));
        });
        let expected = [("a", b'a'), ("b", b'b'), ("c", b'c')];
        let expected = expected.map(|(name, status)| (name.to_owned(), status));
        assert_eq!(results, expected);
    }
}
