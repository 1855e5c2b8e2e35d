//! PID 1's children: helpers, containers' processes, and orphans. Each of them is reaped, and its status reported to those
//! who wait for it.

use rustix::process::{Pid, WaitOptions, WaitStatus};
use std::cell::RefCell;
use std::collections::{HashMap, VecDeque};
use std::rc::Rc;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

/// Maximum number of remembered exits that nothing has asked for: a container's process can end before its PID is known.
const REMEMBERED: usize = 4096;

/// The exit status in the form of a shell.
pub(crate) fn shell_status(status: WaitStatus) -> i32 {
    match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => code,
        (None, Some(signal)) => 128 + signal,
        (None, None) => 255,
    }
}

#[derive(Default)]
struct State {
    waiting: HashMap<i32, watch::Sender<Option<i32>>>,
    ended: HashMap<i32, i32>,
    order: VecDeque<i32>,
}

/// Cheap to clone; only for the agent's main thread.
#[derive(Clone, Default)]
pub(crate) struct Reaper(Rc<RefCell<State>>);

/// The end of one process.
pub(crate) type End = watch::Receiver<Option<i32>>;

impl Reaper {
    /// Reaps children, forever.
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        let mut signals = signal(SignalKind::child())?;
        loop {
            self.collect();
            signals.recv().await;
        }
    }

    fn collect(&self) {
        while let Ok(Some((pid, status))) = rustix::process::wait(WaitOptions::NOHANG) {
            if status.stopped() || status.continued() {
                continue;
            }
            self.ended(pid, shell_status(status));
        }
    }

    fn ended(&self, pid: Pid, status: i32) {
        let pid = pid.as_raw_nonzero().get();
        let mut state = self.0.borrow_mut();
        if let Some(waiting) = state.waiting.remove(&pid) {
            waiting.send_replace(Some(status));
            return;
        }
        state.ended.insert(pid, status);
        state.order.push_back(pid);
        while state.order.len() > REMEMBERED {
            if let Some(oldest) = state.order.pop_front() {
                state.ended.remove(&oldest);
            }
        }
    }

    /// Forgets the exits that nothing has asked for: called when no PID is awaited, since PIDs are reused.
    pub(crate) fn forget(&self) {
        let mut state = self.0.borrow_mut();
        state.ended.clear();
        state.order.clear();
    }

    /// Follows a process to its end.
    pub(crate) fn follow(&self, pid: i32) -> End {
        let mut state = self.0.borrow_mut();
        if let Some(status) = state.ended.remove(&pid) {
            state.order.retain(|p| *p != pid);
            return watch::channel(Some(status)).1;
        }
        if let Some(waiting) = state.waiting.get(&pid) {
            return waiting.subscribe();
        }
        let (sender, receiver) = watch::channel(None);
        state.waiting.insert(pid, sender);
        receiver
    }
}

/// Waits for the end; returns the status in the form of a shell.
pub(crate) async fn wait(mut end: End) -> i32 {
    match end.wait_for(Option::is_some).await {
        Ok(status) => status.unwrap_or(255),
        Err(_) => 255,
    }
}
