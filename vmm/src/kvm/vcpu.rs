//! One vCPU: KVM_RUN, its exits, and kicks from other threads.
//!
//! A library must not install signal handlers. The kick is therefore a signal that is blocked in the vCPU's
//! thread and unblocked only inside KVM_RUN (KVM_SET_SIGNAL_MASK): KVM_RUN returns EINTR, no handler runs,
//! and the thread consumes the pending signal itself. A kick that arrives just before KVM_RUN stays pending
//! and ends it at once, so none is lost.

use super::Machine;
use koya_host::sync::lock;
use kvm_bindings::{KVM_EXIT_INTERNAL_ERROR, KVMIO, kvm_signal_mask};
use kvm_ioctls::{VcpuExit, VcpuFd};
use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex};
use vmm_sys_util::ioctl::ioctl_with_ptr;
use vmm_sys_util::ioctl_iow_nr;

ioctl_iow_nr!(KVM_SET_SIGNAL_MASK, KVMIO, 0x8b, kvm_signal_mask);

/// The kernel's first real-time signal.
const FIRST_REALTIME: usize = 32;

/// Size of the kernel type `sigset_t`, in bytes.
const KERNEL_SIGSET: usize = 8;

/// `kvm_signal_mask` with its flexible array.
#[repr(C)]
struct SignalMask {
    len: u32,
    set: [u8; KERNEL_SIGSET],
}

fn kick_signal() -> libc::c_int {
    libc::SIGRTMIN()
}

/// A vCPU, owned by the thread that runs it. It keeps its machine, with the mapped memory, alive.
pub struct Vcpu {
    fd: VcpuFd,
    _machine: Arc<Machine>,
    kicker: Kicker,
    /// The signal mask to restore when the vCPU leaves a thread of the caller.
    before: Option<libc::sigset_t>,
}

/// The kind of thread that runs a vCPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Thread {
    /// The monitor's own thread: the process's signals go to other threads.
    Dedicated,
    /// The caller's thread: it still receives the signals that it has not blocked, also while the guest runs.
    Caller,
}

/// The reason why KVM_RUN returned.
#[derive(Debug)]
pub enum Exit<'a> {
    /// Read of one or more bytes from a port.
    PortRead(u16, &'a mut [u8]),
    /// Write of one or more bytes to a port.
    PortWrite(u16, &'a [u8]),
    /// Read of device memory.
    MmioRead(u64, &'a mut [u8]),
    /// Write to device memory.
    MmioWrite(u64, &'a [u8]),
    /// HLT without an in-kernel interrupt controller to wake the vCPU.
    Halt,
    /// Triple fault.
    Shutdown,
    /// System event requested by the guest (PSCI, Hyper-V).
    SystemEvent(u32),
    /// KVM could not emulate something.
    InternalError(String),
    /// The CPU refused to enter the guest.
    FailEntry(u64),
    /// Interrupted by a kick or a signal: check the run control.
    Kicked,
    /// Anything else.
    Other(String),
}

impl Vcpu {
    /// Creates vCPU `index` of a machine.
    ///
    /// # Errors
    /// The error from KVM.
    pub fn new(
        machine: &Arc<Machine>,
        index: u32,
        kicker: Kicker,
    ) -> Result<Self, kvm_ioctls::Error> {
        Ok(Self {
            fd: machine.fd().create_vcpu(index.into())?,
            _machine: machine.clone(),
            kicker,
            before: None,
        })
    }

    /// The vCPU's file descriptor, for register access.
    pub fn fd(&self) -> &VcpuFd {
        &self.fd
    }

    /// Binds the vCPU to the calling thread: kicks reach it from now on. Call this first in the thread that
    /// calls [`run`](Self::run); the vCPU must be dropped there too.
    ///
    /// # Errors
    /// If KVM refuses the signal mask.
    pub fn enter_thread(&mut self, thread: Thread) -> io::Result<()> {
        let blocked = match thread {
            Thread::Dedicated => koya_host::sys::block_signals(),
            Thread::Caller => *self.before.insert(block_kicks()),
        };
        let mask = mask_in_guest(&blocked);
        // SAFETY: KVM reads `len` and then `len` bytes: SignalMask holds both.
        let result = unsafe { ioctl_with_ptr(&self.fd, KVM_SET_SIGNAL_MASK(), &raw const mask) };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        self.kicker.enter();
        Ok(())
    }

    /// Unbinds the vCPU from the thread: kicks no longer reach it, and it must not run the guest any more.
    /// The signal mask of a caller's thread is restored.
    pub fn leave_thread(&mut self) {
        self.kicker.leave();
        if let Some(before) = self.before.take() {
            // Once the signal is unblocked, a pending kick would kill the process.
            consume_kicks();
            // SAFETY: the set is one that the C library wrote; only this thread's mask changes.
            unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &before, std::ptr::null_mut()) };
        }
    }

    /// Runs the guest until it exits.
    ///
    /// # Errors
    /// The error from KVM_RUN, if it is not an exit.
    pub fn run(&mut self) -> Result<Exit<'_>, kvm_ioctls::Error> {
        // The internal-error details are read after the match, when no exit borrows the vCPU.
        let exit = match self.fd.run() {
            Ok(VcpuExit::InternalError) => None,
            Ok(VcpuExit::IoIn(port, data)) => {
                // SAFETY: the slice points into this vCPU's kvm_run mapping, which lives as
                // long as `self` is borrowed; the borrow checker can't see that this arm ends
                // the match.
                Some(Exit::PortRead(port, unsafe { extend_mut(data) }))
            }
            // SAFETY: as above.
            Ok(VcpuExit::IoOut(port, data)) => Some(Exit::PortWrite(port, unsafe { extend(data) })),
            Ok(VcpuExit::MmioRead(address, data)) => {
                // SAFETY: as above.
                Some(Exit::MmioRead(address, unsafe { extend_mut(data) }))
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                // SAFETY: as above.
                Some(Exit::MmioWrite(address, unsafe { extend(data) }))
            }
            Ok(VcpuExit::Hlt) => Some(Exit::Halt),
            Ok(VcpuExit::Shutdown) => Some(Exit::Shutdown),
            Ok(VcpuExit::SystemEvent(kind, _)) => Some(Exit::SystemEvent(kind)),
            Ok(VcpuExit::FailEntry(reason, _)) => Some(Exit::FailEntry(reason)),
            Ok(VcpuExit::Intr) => Some(Exit::Kicked),
            Ok(other) => Some(Exit::Other(format!("{other:?}"))),
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {
                consume_kicks();
                Some(Exit::Kicked)
            }
            Err(error) => return Err(error),
        };
        Ok(exit.unwrap_or_else(|| Exit::InternalError(self.internal_error())))
    }

    fn internal_error(&mut self) -> String {
        let run = self.fd.get_kvm_run();
        if run.exit_reason != KVM_EXIT_INTERNAL_ERROR {
            return "unknown".into();
        }
        // SAFETY: the exit reason says which member of the union KVM filled; all its fields are
        // plain numbers.
        let internal = unsafe { run.__bindgen_anon_1.internal };
        let count = (internal.ndata as usize).min(internal.data.len());
        format!(
            "suberror {} data {:x?}",
            internal.suberror,
            &internal.data[..count]
        )
    }
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        self.leave_thread();
    }
}

/// Blocks kicks in this thread and returns the previous signal mask.
fn block_kicks() -> libc::sigset_t {
    // SAFETY: both sets live on this stack; only the calling thread's mask changes.
    unsafe {
        let (mut kicks, mut before) = (std::mem::zeroed(), std::mem::zeroed());
        libc::sigemptyset(&mut kicks);
        libc::sigaddset(&mut kicks, kick_signal());
        libc::pthread_sigmask(libc::SIG_BLOCK, &kicks, &mut before);
        before
    }
}

/// The signals to block inside KVM_RUN, given those `blocked` in this thread: all of them except the kick and
/// the lower real-time signals, which belong to the C library: it waits for every thread to handle them (for
/// setuid among others).
fn mask_in_guest(blocked: &libc::sigset_t) -> SignalMask {
    let mut set = [0; KERNEL_SIGSET];
    for signal in 1..=8 * KERNEL_SIGSET {
        // SAFETY: the set is one that the C library wrote, and it knows this many signals.
        let is_blocked = unsafe { libc::sigismember(blocked, signal as libc::c_int) } == 1;
        let is_kick = (FIRST_REALTIME..=kick_signal() as usize).contains(&signal);
        if is_blocked && !is_kick {
            set[(signal - 1) / 8] |= 1 << ((signal - 1) % 8);
        }
    }
    SignalMask {
        len: KERNEL_SIGSET as u32,
        set,
    }
}

/// Extends the lifetime of a slice of kvm_run to that of the vCPU's borrow.
///
/// # SAFETY: the caller keeps the vCPU borrowed for 'a.
unsafe fn extend<'a>(data: &[u8]) -> &'a [u8] {
    // SAFETY: the caller keeps the vCPU borrowed for 'a.
    unsafe { std::slice::from_raw_parts(data.as_ptr(), data.len()) }
}

/// Extends the lifetime of a slice of kvm_run to that of the vCPU's borrow.
///
/// # SAFETY: the caller keeps the vCPU borrowed for 'a and uses the slice nowhere else.
unsafe fn extend_mut<'a>(data: &mut [u8]) -> &'a mut [u8] {
    // SAFETY: the caller keeps the vCPU borrowed for 'a, and nobody else uses the slice.
    unsafe { std::slice::from_raw_parts_mut(data.as_mut_ptr(), data.len()) }
}

/// Consumes pending kicks of this thread, which have had their effect.
fn consume_kicks() {
    let now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the sets and the time live on this stack; a null pointer asks for no details.
    unsafe {
        let mut kicks: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut kicks);
        libc::sigaddset(&mut kicks, kick_signal());
        while libc::sigtimedwait(&kicks, std::ptr::null_mut(), &now) > 0 {}
    }
}

/// Makes a vCPU leave the guest; may be used from any thread.
#[derive(Clone, Default)]
pub struct Kicker(Arc<Mutex<Option<libc::pid_t>>>);

impl Kicker {
    fn enter(&self) {
        let thread = rustix::thread::gettid().as_raw_nonzero().get();
        *lock(&self.0) = Some(thread);
    }

    fn leave(&self) {
        *lock(&self.0) = None;
    }

    /// Ends the vCPU's current or next KVM_RUN. Does nothing if its thread is gone.
    pub fn kick(&self) {
        // The lock is held over the call, so that the thread cannot end, and its ID cannot be reused, before
        // the signal is sent.
        let thread = lock(&self.0);
        if let Some(thread) = *thread {
            // SAFETY: only integers are passed. The thread is ours, alive, and has the signal blocked.
            unsafe {
                libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, kick_signal());
            }
        }
    }
}

impl std::fmt::Debug for Vcpu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "vCPU on descriptor {}", self.fd.as_raw_fd())
    }
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::*;
    use crate::arch;
    use crate::kvm::{Machine, open};
    use koya_devices::virtio::Memory;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::time::Duration;
    use vm_memory::{Bytes, GuestAddress};

    /// A vCPU that halts: cli; hlt.
    fn sleeper(kicker: Kicker) -> Vcpu {
        let kvm = open().unwrap();
        let memory = Memory::from_ranges(&[(GuestAddress(0), 2 << 20)]).unwrap();
        memory.write_slice(&[0xfa, 0xf4], GuestAddress(0)).unwrap();
        let machine = Arc::new(Machine::new(&kvm, Arc::new(memory)).unwrap());
        let mut features = arch::features(&kvm).unwrap();
        arch::prepare_vm(&mut features, machine.fd()).unwrap();
        // The vCPU keeps the machine alive.
        let vcpu = Vcpu::new(&machine, 0, kicker).unwrap();
        arch::prepare_vcpu(&features, vcpu.fd(), 0, 1).unwrap();
        arch::set_entry(vcpu.fd(), arch::Entry::Real).unwrap();
        vcpu
    }

    fn blocked() -> Vec<libc::c_int> {
        // SAFETY: a null pointer asks for the thread's mask, which is written to this stack.
        let set = unsafe {
            let mut set = std::mem::zeroed();
            libc::pthread_sigmask(libc::SIG_BLOCK, std::ptr::null(), &mut set);
            set
        };
        (1..=64)
            // SAFETY: the set is one that the C library wrote.
            .filter(|&signal| unsafe { libc::sigismember(&set, signal) } == 1)
            .collect()
    }

    static HANDLED: AtomicBool = AtomicBool::new(false);

    extern "C" fn handle(_: libc::c_int) {
        HANDLED.store(true, Ordering::SeqCst);
    }

    #[test]
    fn a_callers_thread_gets_its_signals_in_the_guest_and_its_mask_back() {
        // SAFETY: the handler only stores to an atomic.
        unsafe { libc::signal(libc::SIGUSR1, handle as *const () as libc::sighandler_t) };
        let kicker = Kicker::default();
        let mut vcpu = sleeper(kicker.clone());
        let (said, thread) = std::sync::mpsc::channel();
        let runs = std::thread::spawn(move || {
            let before = blocked();
            vcpu.enter_thread(Thread::Caller).unwrap();
            said.send(rustix::thread::gettid().as_raw_nonzero().get())
                .unwrap();
            assert!(matches!(vcpu.run().unwrap(), Exit::Kicked));
            assert!(HANDLED.load(Ordering::SeqCst));
            // The guest runs until a kick; a second kick does no harm.
            assert!(matches!(vcpu.run().unwrap(), Exit::Kicked));
            vcpu.leave_thread();
            assert_eq!(blocked(), before);
        });
        let number = thread.recv().unwrap();
        while !HANDLED.load(Ordering::SeqCst) && !runs.is_finished() {
            // SAFETY: only integers are passed; the thread is joined below.
            unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), number, libc::SIGUSR1) };
            std::thread::sleep(Duration::from_millis(10));
        }
        while !runs.is_finished() {
            kicker.kick();
            std::thread::sleep(Duration::from_millis(10));
        }
        runs.join().unwrap();
    }
}
