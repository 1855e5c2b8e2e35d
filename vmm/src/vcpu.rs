//! The vCPU threads: run, handle the exit, run again, until there is a reason to end.
//!
//! ```text
//!              pause()                   all parked
//!   Running ───────────▶ each leaves KVM_RUN ─────────▶ Paused
//!      ▲                                                  │
//!      └───────────────────── resume() ───────────────────┘
//!   any state ── end(reason) ──▶ Ended: threads return, the first reason is kept
//! ```

use crate::arch;
use crate::bus::{Bus, Effect};
use crate::exit::ExitReason;
use crate::kvm::{Exit, Kicker, Thread, Vcpu};
use crate::sync::{lock, wait};
use std::sync::{Arc, Condvar, Mutex};

/// What the vCPUs are to do.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Wanted {
    Run,
    Pause,
    End(ExitReason),
}

struct State {
    wanted: Wanted,
    parked: usize,
    alive: usize,
}

/// What vCPU threads, the event loop and the owner share.
pub(crate) struct Gate {
    state: Mutex<State>,
    changed: Condvar,
    kickers: Vec<Kicker>,
}

impl Gate {
    /// A gate for as many vCPUs, which do not run before [`resume`](Self::resume).
    pub(crate) fn new(kickers: Vec<Kicker>) -> Self {
        Self {
            state: Mutex::new(State {
                wanted: Wanted::Pause,
                parked: 0,
                alive: kickers.len(),
            }),
            changed: Condvar::new(),
            kickers,
        }
    }

    /// Ends the virtual machine; only the first reason is kept.
    pub(crate) fn end(&self, reason: ExitReason) {
        let mut state = lock(&self.state);
        if !matches!(state.wanted, Wanted::End(_)) {
            state.wanted = Wanted::End(reason);
        }
        drop(state);
        self.tell();
    }

    /// Stops every vCPU outside the guest and returns when all have. False if it has ended.
    pub(crate) fn pause(&self) -> bool {
        let mut state = lock(&self.state);
        if state.wanted == Wanted::Run {
            state.wanted = Wanted::Pause;
        }
        drop(state);
        self.tell();
        let mut state = lock(&self.state);
        while state.parked < state.alive && state.wanted == Wanted::Pause {
            state = wait(&self.changed, state);
        }
        state.wanted == Wanted::Pause
    }

    /// Lets the vCPUs go on. False if it has ended.
    pub(crate) fn resume(&self) -> bool {
        let mut state = lock(&self.state);
        if state.wanted == Wanted::Pause {
            state.wanted = Wanted::Run;
        }
        let running = state.wanted == Wanted::Run;
        drop(state);
        self.changed.notify_all();
        running
    }

    /// Waits for the end.
    pub(crate) fn wait(&self) -> ExitReason {
        let mut state = lock(&self.state);
        loop {
            if let Wanted::End(reason) = &state.wanted {
                return reason.clone();
            }
            state = wait(&self.changed, state);
        }
    }

    /// The reason, if it has ended.
    pub(crate) fn ended(&self) -> Option<ExitReason> {
        match &lock(&self.state).wanted {
            Wanted::End(reason) => Some(reason.clone()),
            _ => None,
        }
    }

    fn tell(&self) {
        self.changed.notify_all();
        for kicker in &self.kickers {
            kicker.kick();
        }
    }

    /// Called by a vCPU outside the guest: waits while paused; false when it is time to end.
    /// The second value says whether it was paused.
    fn pass(&self) -> (bool, bool) {
        let mut state = lock(&self.state);
        let mut paused = false;
        while state.wanted == Wanted::Pause {
            if !paused {
                paused = true;
                state.parked += 1;
                self.changed.notify_all();
            }
            state = wait(&self.changed, state);
        }
        if paused {
            state.parked -= 1;
        }
        (state.wanted == Wanted::Run, paused)
    }

    fn leave(&self) {
        lock(&self.state).alive -= 1;
        self.changed.notify_all();
    }
}

/// A vCPU's whole life, on this thread.
pub(crate) fn run(mut vcpu: Vcpu, thread: Thread, gate: &Arc<Gate>, bus: &Bus) {
    let _left = Left(gate);
    if let Err(error) = vcpu.enter_thread(thread) {
        let details = format!("cannot set a vCPU's signal mask: {error}");
        return gate.end(ExitReason::RunError { details });
    }
    let mut first = true;
    loop {
        let (go_on, was_paused) = gate.pass();
        if !go_on {
            break;
        }
        if was_paused && !std::mem::take(&mut first) {
            // Tells the guest's watchdogs that time passed without it; refused by guests
            // without a kvmclock, which have nobody to tell.
            arch::after_pause(vcpu.fd());
        }
        if let Some(reason) = run_until_kicked(&mut vcpu, bus) {
            bus.marks().guest(match &reason {
                ExitReason::Reset => "reset",
                ExitReason::TripleFault { .. } => "triple fault",
                _ => "cannot go on",
            });
            // It is over for this one: what tells the others need not kick it.
            vcpu.leave_thread();
            gate.end(reason);
        }
    }
}

/// Says that a vCPU's thread is over; if it panicked (a console that an embedder wrote may), that
/// is the machine's end too, since nobody would wait for it otherwise.
struct Left<'g>(&'g Gate);

impl Drop for Left<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let details = "its thread panicked".to_owned();
            self.0.end(ExitReason::RunError { details });
        }
        self.0.leave();
    }
}

fn run_until_kicked(vcpu: &mut Vcpu, bus: &Bus) -> Option<ExitReason> {
    loop {
        let exit = match vcpu.run() {
            Ok(exit) => exit,
            Err(error) => {
                let details = format!("KVM_RUN: {error}; {}", arch::describe_vcpu(vcpu.fd()));
                return Some(ExitReason::RunError { details });
            }
        };
        match exit {
            Exit::MmioRead(address, data) => bus.mmio_read(address, data),
            Exit::MmioWrite(address, data) => bus.mmio_write(address, data),
            Exit::PortRead(port, data) => bus.port_read(port, data),
            Exit::PortWrite(port, data) => {
                if bus.port_write(port, data) == Effect::Reset {
                    return Some(ExitReason::Reset);
                }
            }
            Exit::Kicked => return None,
            Exit::Shutdown => {
                let details = arch::describe_vcpu(vcpu.fd());
                let log = String::new();
                return Some(ExitReason::TripleFault { details, log });
            }
            Exit::SystemEvent(_) => return Some(ExitReason::Reset),
            Exit::InternalError(details) => {
                let details = format!("{details}; {}", arch::describe_vcpu(vcpu.fd()));
                return Some(ExitReason::InternalError { details });
            }
            Exit::FailEntry(reason) => {
                let registers = arch::describe_vcpu(vcpu.fd());
                let details = format!("entry refused, hardware reason {reason:#x}; {registers}");
                return Some(ExitReason::RunError { details });
            }
            Exit::Halt => {
                let details = "HLT outside KVM's interrupt controller".to_owned();
                return Some(ExitReason::RunError { details });
            }
            Exit::Other(what) => {
                let details = format!("{what}; {}", arch::describe_vcpu(vcpu.fd()));
                return Some(ExitReason::InternalError { details });
            }
        }
    }
}
