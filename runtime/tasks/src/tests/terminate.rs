//! Termination of containers.

use super::{FakeProcess, Guest, LIMIT};
use crate::machine::GuestContainer;
use crate::sync::spawn;
use crate::terminate::end;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

const GRACE: Duration = Duration::from_millis(200);

fn end_behind(guest: &Arc<Guest>, grace: Duration) -> Receiver<()> {
    let container = FakeProcess(guest.clone(), "c".into());
    let container: Arc<dyn GuestContainer> = Arc::new(container);
    let (sender, ended) = channel();
    let work = move || {
        end(&container, 15, grace).unwrap();
        sender.send(()).ok();
    };
    spawn("koya-test", work).unwrap();
    ended
}

#[test]
fn one_that_ends_by_sigterm_is_not_killed() {
    let guest = Arc::<Guest>::default();
    let ended = end_behind(&guest, LIMIT * 3);
    guest.await_call("signal 15 c");
    guest.ends("c", 143);
    ended.recv_timeout(LIMIT).unwrap();
    assert!(!guest.was_called("kill c"));
}

#[test]
fn one_that_does_not_is_killed_also_by_a_guest_that_holds_the_signal() {
    for held in [false, true] {
        let guest = Arc::<Guest>::default();
        if held {
            guest.hold("signal 15 c");
        }
        let began = Instant::now();
        let ended = end_behind(&guest, GRACE);
        ended.recv_timeout(LIMIT).unwrap();
        assert!(began.elapsed() >= GRACE);
        assert!(guest.was_called("signal 15 c") && guest.was_called("kill c"));
    }
}

/// Like a container whose disks are being flushed.
#[test]
fn an_end_that_takes_its_time_after_sigkill_is_waited_for() {
    let guest = Arc::<Guest>::default();
    guest.change(|state| state.ignores_kills = true);
    let ended = end_behind(&guest, Duration::ZERO);
    guest.await_call("kill c");
    assert!(ended.recv_timeout(GRACE * 3).is_err());
    guest.ends("c", 137);
    ended.recv_timeout(LIMIT).unwrap();
    assert!(!guest.was_called("kill machine"));
}
