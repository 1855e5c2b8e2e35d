//! vCPU threads: run the guest, handle the exit, run it again, until there is a reason to end.
//!
//! ```text
//!              pause()                   all parked
//!   Running ───────────▶ each leaves KVM_RUN ─────────▶ Paused
//!      ▲                                                  │
//!      └───────────────────── resume() ───────────────────┘
//!   any state ── end(reason) ──▶ Ended: threads return, the first reason is kept
//! ```
//!
//! vCPUs that are not online are held: their threads wait here as while paused and do not enter KVM_RUN. KVM
//! keeps the INIT and SIPI that the guest sends them until they do, so the owner decides which CPUs run,
//! whatever the guest kernel does.

use crate::arch;
use crate::bus::{Bus, Effect};
use crate::exit::ExitReason;
use crate::kvm::{Exit, Kicker, Thread, Vcpu};
use koya_host::sync::{lock, wait};
use kvm_bindings::{KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN};
use std::sync::{Arc, Condvar, Mutex};

/// The state that vCPUs must be in.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Target {
    Run,
    Pause,
    End(ExitReason),
}

struct State {
    target: Target,
    /// vCPUs from this one on are held.
    online: usize,
    /// Number of waiting vCPU threads, paused or held.
    parked: usize,
    alive: usize,
}

impl State {
    /// Whether a vCPU must wait outside the guest.
    fn holds(&self, index: usize) -> bool {
        match self.target {
            Target::Run => index >= self.online,
            Target::Pause => true,
            Target::End(_) => false,
        }
    }
}

/// Run control of the vCPUs, shared by vCPU threads, the event loop and the owner.
pub(crate) struct RunControl {
    state: Mutex<State>,
    changed: Condvar,
    kickers: Vec<Kicker>,
}

impl RunControl {
    /// Run control of `kickers.len()` vCPUs. They start paused; after [`resume`](Self::resume) the first
    /// `online` run.
    pub(crate) fn new(kickers: Vec<Kicker>, online: usize) -> Self {
        Self {
            state: Mutex::new(State {
                target: Target::Pause,
                online,
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
        if !matches!(state.target, Target::End(_)) {
            state.target = Target::End(reason);
        }
        drop(state);
        self.notify();
    }

    /// Pauses all vCPUs and waits until they have left the guest. False if the machine has ended.
    pub(crate) fn pause(&self) -> bool {
        let mut state = lock(&self.state);
        if state.target == Target::Run {
            state.target = Target::Pause;
        }
        drop(state);
        self.notify();
        let mut state = lock(&self.state);
        while state.parked < state.alive && state.target == Target::Pause {
            state = wait(&self.changed, state);
        }
        state.target == Target::Pause
    }

    /// Resumes the vCPUs. False if the machine has ended.
    pub(crate) fn resume(&self) -> bool {
        let mut state = lock(&self.state);
        if state.target == Target::Pause {
            state.target = Target::Run;
        }
        let running = state.target == Target::Run;
        drop(state);
        self.changed.notify_all();
        running
    }

    /// Lets the first `online` vCPUs run, at least one and at most all, and holds the others: they are
    /// outside the guest when this returns or soon after.
    pub(crate) fn set_online(&self, online: usize) {
        let online = online.clamp(1, self.kickers.len().max(1));
        lock(&self.state).online = online;
        self.changed.notify_all();
        for kicker in self.kickers.iter().skip(online) {
            kicker.kick();
        }
    }

    /// Number of vCPUs that may run.
    pub(crate) fn online(&self) -> usize {
        lock(&self.state).online
    }

    /// Waits until the machine ends.
    pub(crate) fn wait(&self) -> ExitReason {
        let mut state = lock(&self.state);
        loop {
            if let Target::End(reason) = &state.target {
                return reason.clone();
            }
            state = wait(&self.changed, state);
        }
    }

    /// The reason why the machine ended, if it has.
    pub(crate) fn ended(&self) -> Option<ExitReason> {
        match &lock(&self.state).target {
            Target::End(reason) => Some(reason.clone()),
            _ => None,
        }
    }

    fn notify(&self) {
        self.changed.notify_all();
        for kicker in &self.kickers {
            kicker.kick();
        }
    }

    /// Called by vCPU `index` outside the guest: waits while paused or held. Returns whether to go on, and
    /// whether it waited.
    fn wait_until_runnable(&self, index: usize) -> (bool, bool) {
        let mut state = lock(&self.state);
        let mut waited = false;
        while state.holds(index) {
            if !waited {
                waited = true;
                state.parked += 1;
                self.changed.notify_all();
            }
            state = wait(&self.changed, state);
        }
        if waited {
            state.parked -= 1;
        }
        (state.target == Target::Run, waited)
    }

    fn leave(&self) {
        lock(&self.state).alive -= 1;
        self.changed.notify_all();
    }
}

/// Runs a vCPU on this thread until the machine ends.
pub(crate) fn run(
    index: usize,
    mut vcpu: Vcpu,
    thread: Thread,
    control: &Arc<RunControl>,
    bus: &Bus,
) {
    let _guard = ThreadGuard(control);
    if let Err(error) = vcpu.enter_thread(thread) {
        let details = format!("cannot set a vCPU's signal mask: {error}");
        return control.end(ExitReason::RunError { details });
    }
    let mut first = true;
    loop {
        let (go_on, has_waited) = control.wait_until_runnable(index);
        if !go_on {
            break;
        }
        if has_waited && !std::mem::take(&mut first) {
            // Tells the guest's watchdogs that it was stopped; guests without kvmclock refuse this.
            arch::after_pause(vcpu.fd());
        }
        if let Some(reason) = run_until_kicked(&mut vcpu, bus) {
            bus.boot_events().guest(match &reason {
                ExitReason::Reset => "reset",
                ExitReason::TripleFault { .. } => "triple fault",
                _ => "cannot go on",
            });
            // This vCPU is done and needs no kick when the others are notified.
            vcpu.leave_thread();
            control.end(reason);
        }
    }
}

/// Records the end of a vCPU thread. If the thread panicked (an embedder's console may), it ends the machine
/// too, since nobody would wait for it otherwise.
struct ThreadGuard<'g>(&'g RunControl);

impl Drop for ThreadGuard<'_> {
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
            Exit::MmioWrite(address, data) => {
                if bus.mmio_write(address, data) == Effect::Reset {
                    return Some(ExitReason::Reset);
                }
            }
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
            // The guest turned the machine off, or reset it: both end it.
            Exit::SystemEvent(KVM_SYSTEM_EVENT_SHUTDOWN | KVM_SYSTEM_EVENT_RESET) => {
                return Some(ExitReason::Reset);
            }
            Exit::SystemEvent(kind) => {
                let details = format!("system event {kind}; {}", arch::describe_vcpu(vcpu.fd()));
                return Some(ExitReason::InternalError { details });
            }
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

#[cfg(test)]
mod tests {
    use crate::config::Spec;
    use crate::{ExitReason, Vm};
    use koya_devices::virtio::Memory;
    use std::time::{Duration, Instant};
    use vm_memory::{Bytes, GuestAddress};

    #[cfg(target_arch = "x86_64")]
    mod guest {
        /// Through the x2APIC, which is accessible in real mode: sends INIT and SIPI to the second CPU, then
        /// halts.
        pub(super) const START_SECOND: &[u8] = &[
            0x66, 0xb9, 0x1b, 0x00, 0x00, 0x00, // mov ecx, IA32_APIC_BASE
            0x0f, 0x32, // rdmsr
            0x0d, 0x00, 0x0c, // or ax, 0xc00: x2APIC
            0x0f, 0x30, // wrmsr
            0x66, 0xb9, 0x30, 0x08, 0x00, 0x00, // mov ecx, IA32_X2APIC_ICR
            0x66, 0xba, 0x01, 0x00, 0x00, 0x00, // mov edx, 1
            0x66, 0xb8, 0x00, 0x45, 0x00, 0x00, // mov eax, INIT
            0x0f, 0x30, // wrmsr
            0x66, 0xb8, 0x01, 0x46, 0x00, 0x00, // mov eax, SIPI to SECOND
            0x0f, 0x30, // wrmsr
            0xfa, 0xf4, // cli; hlt
        ];
        pub(super) const SECOND: usize = 0x1000;
        /// again: inc word [COUNTER]; jmp again
        pub(super) const COUNT: &[u8] = &[0xff, 0x06, 0x00, 0x05, 0xeb, 0xfa];
        pub(super) const COUNTER: u64 = 0x500;
        /// hlt
        pub(super) const FILL: u8 = 0xf4;
    }

    #[cfg(target_arch = "aarch64")]
    mod guest {
        /// By PSCI: turns on the second CPU, then sleeps.
        pub(super) const START_SECOND: &[u8] = &[
            0x60, 0x00, 0x80, 0xd2, // movz x0, #3: CPU_ON
            0x00, 0x80, 0xb8, 0xf2, // movk x0, #0xc400, lsl 16
            0x21, 0x00, 0x80, 0xd2, // movz x1, #1: the second CPU
            0xa2, 0x7f, 0x00, 0x10, // adr x2, SECOND
            0x03, 0x00, 0x80, 0xd2, // movz x3, #0
            0x02, 0x00, 0x00, 0xd4, // hvc #0
            0x7f, 0x20, 0x03, 0xd5, // l: wfi
            0xff, 0xff, 0xff, 0x17, // b l
        ];
        pub(super) const SECOND: usize = 0x1000;
        /// Counts in memory, and cleans and invalidates the host's cache line: without address translation, a guest's writes
        /// bypass the caches.
        pub(super) const COUNT: &[u8] = &[
            0x01, 0x80, 0x00, 0x10, // adr x1, COUNTER
            0x20, 0x00, 0x40, 0xb9, // again: ldr w0, [x1]
            0x00, 0x04, 0x00, 0x11, // add w0, w0, #1
            0x20, 0x00, 0x00, 0xb9, // str w0, [x1]
            0x21, 0x7e, 0x0b, 0xd5, // dc civac, x1
            0xfc, 0xff, 0xff, 0x17, // b again
        ];
        /// Flat code is loaded to 0x8001_0000.
        pub(super) const COUNTER: u64 = 0x8001_2000;
        pub(super) const FILL: u8 = 0;
    }

    /// A guest that starts a second CPU, which is held.
    fn start() -> Vm {
        let mut code = guest::START_SECOND.to_vec();
        code.resize(guest::SECOND, guest::FILL);
        code.extend(guest::COUNT);
        let mut spec = Spec::flat(code);
        (spec.cpus.count, spec.cpus.online) = (2, 1);
        Vm::builder(spec).start().unwrap()
    }

    fn counts(memory: &Memory) -> bool {
        let read = || {
            memory
                .read_obj::<u16>(GuestAddress(guest::COUNTER))
                .unwrap()
        };
        let (first, began) = (read(), Instant::now());
        while began.elapsed() < Duration::from_millis(200) {
            if read() != first {
                return true;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        false
    }

    fn counts_soon(memory: &Memory) -> bool {
        (0..50).any(|_| counts(memory))
    }

    #[test]
    fn a_cpu_runs_only_while_online() {
        let vm = start();
        let memory = vm.memory().clone();
        assert!(!counts(&memory));
        let handle = vm.handle();
        // The INIT and SIPI sent meanwhile are not lost.
        handle.set_online_cpus(2);
        assert!(counts_soon(&memory));
        handle.set_online_cpus(1);
        let held = (0..50).any(|_| !counts(&memory));
        assert!(held && !counts(&memory));
        handle.set_online_cpus(9);
        assert_eq!(handle.online_cpus(), 2);
        assert!(counts_soon(&memory));
        assert_eq!(handle.ended(), None);
        assert_eq!(vm.stop(), ExitReason::Stopped);
    }

    #[test]
    fn a_guest_has_scalable_vectors_or_is_refused() {
        let mut spec = Spec::flat(guest::START_SECOND);
        spec.cpus.sve = true;
        match Vm::builder(spec).start() {
            Ok(vm) => {
                assert_eq!(std::env::consts::ARCH, "aarch64");
                assert_eq!(vm.stop(), ExitReason::Stopped);
            }
            Err(error) => {
                let error = error.to_string();
                assert!(error.starts_with("`sve` on ") && error.ends_with("is not supported"));
            }
        }
    }

    #[test]
    fn a_held_cpu_does_not_block_pause_and_stop() {
        let vm = start();
        let handle = vm.handle();
        for _ in 0..20 {
            assert!(handle.pause());
            assert!(handle.resume());
        }
        assert!(handle.pause());
        handle.set_online_cpus(2);
        assert!(!counts(vm.memory()));
        assert!(handle.resume());
        assert!(counts_soon(vm.memory()));
        // With one held vCPU and one that runs.
        handle.set_online_cpus(0);
        assert!(handle.pause() && handle.resume());
        assert_eq!(handle.online_cpus(), 1);
        assert_eq!(vm.stop(), ExitReason::Stopped);
    }
}
