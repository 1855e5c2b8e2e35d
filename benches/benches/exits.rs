//! Cost of an exit of the guest: real KVM, guests of a few instructions, no Linux. On a KVM that emulates guest kernels in
//! software, the figures measure that rather than Koya.
#![allow(missing_docs)] // criterion's macros make public items.

use criterion::{Criterion, criterion_group, criterion_main};
use koya_devices::virtio::Memory;
use koya_vmm::internals::{self as arch, Bus, Exit, Kicker, Machine, Vcpu};
use koya_vmm::kvm;
use kvm_ioctls::{IoEventAddress, NoDatamatch};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

/// Guest memory size; addresses above it belong to a device.
const MEMORY: usize = 64 << 10;
/// The main program, behind the interrupt vectors; a jump at 0 leads to it.
const CODE: u64 = 0x1100;
const JUMP: &[u8] = &[0xe9, 0xfd, 0x10];
/// The interrupt handler, and its vector: line 4 of the first controller, whose vectors begin at 8.
const HANDLER: u16 = 0x1200;
const VECTOR: u64 = 4 * (8 + 4);
const LINE: u32 = 4;
/// A port whose writes are handled in the kernel (ioeventfd).
const KICK_PORT: u64 = 0x90;

/// L: out 0x80, al; jmp L
const WRITE_PORT: &[u8] = &[0xe6, 0x80, 0xeb, 0xfc];
/// L: in al, 0x80; jmp L
const READ_PORT: &[u8] = &[0xe4, 0x80, 0xeb, 0xfc];
/// mov ax, 0x2000; mov ds, ax; L: mov [0], al; jmp L
const WRITE_MEMORY: &[u8] = &[0xb8, 0x00, 0x20, 0x8e, 0xd8, 0xa2, 0x00, 0x00, 0xeb, 0xfb];
/// L: out 0x90, al; out 0x80, al; jmp L
const KICK: &[u8] = &[0xe6, 0x90, 0xe6, 0x80, 0xeb, 0xfa];
/// Setup of the interrupt controller: vectors from 8, automatic end of interrupt, only line 4.
const CONTROLLER: &[u8] = &[
    0xb0, 0x11, 0xe6, 0x20, 0xb0, 0x08, 0xe6, 0x21, 0xb0, 0x04, 0xe6, 0x21, 0xb0, 0x03, 0xe6, 0x21,
    0xb0, 0xef, 0xe6, 0x21,
];
/// out 0x80, al; sti; L: hlt; jmp L
const WAIT: &[u8] = &[0xe6, 0x80, 0xfb, 0xf4, 0xeb, 0xfd];
/// L: cli; out 0x90, al; sti; hlt; jmp L
const KICK_AND_WAIT: &[u8] = &[0xfa, 0xe6, 0x90, 0xfb, 0xf4, 0xeb, 0xf9];
/// out 0x81, al; iret
const HANDLE: &[u8] = &[0xe6, 0x81, 0xcf];

struct Guest {
    vcpu: Vcpu,
    machine: Arc<Machine>,
    bus: Bus,
}

impl Guest {
    fn new(parts: &[&[u8]]) -> Self {
        let kvm = kvm::open().expect("it was there");
        let memory = Memory::from_ranges(&[(GuestAddress(0), MEMORY)]).expect("memory");
        let write = |bytes: &[u8], at| memory.write_slice(bytes, GuestAddress(at)).expect("room");
        write(JUMP, 0);
        write(&parts.concat(), CODE);
        write(HANDLE, HANDLER.into());
        write(&HANDLER.to_le_bytes(), VECTOR);
        let machine = Machine::new(&kvm, Arc::new(memory)).expect("a machine");
        let machine = Arc::new(machine);
        let mut features = arch::features(&kvm).expect("features");
        arch::prepare_vm(&mut features, machine.fd()).expect("interrupt controllers");
        let vcpu = Vcpu::new(&machine, 0, Kicker::default()).expect("a vCPU");
        arch::prepare_vcpu(&features, vcpu.fd(), 0, 1).expect("registers");
        arch::set_entry(vcpu.fd(), arch::Entry::Real).expect("registers");
        Self {
            vcpu,
            machine,
            bus: Bus::default(),
        }
    }

    /// Runs to the next exit, and handles it like the monitor.
    fn turn(&mut self) {
        match self.vcpu.run().expect("KVM_RUN") {
            Exit::PortWrite(port, data) => {
                self.bus.port_write(port, data);
            }
            Exit::PortRead(port, data) => self.bus.port_read(port, data),
            Exit::MmioWrite(address, data) => {
                self.bus.mmio_write(address, data);
            }
            other => panic!("{other:?}"),
        }
    }
}

fn event() -> EventFd {
    EventFd::new(0).expect("an event")
}

fn bench(c: &mut Criterion) {
    if let Err(error) = kvm::open() {
        eprintln!("exits: skipped: {error}");
        return;
    }
    let mut group = c.benchmark_group("exit");
    let plain: [(&str, &[u8]); 3] = [
        ("write to a port", WRITE_PORT),
        ("read from a port", READ_PORT),
        ("write to device memory", WRITE_MEMORY),
    ];
    for (name, code) in plain {
        let mut guest = Guest::new(&[code]);
        group.bench_function(name, |b| b.iter(|| guest.turn()));
    }

    // In addition to the port write: a kick that never leaves the kernel.
    let mut guest = Guest::new(&[KICK]);
    let kick = event();
    let port = IoEventAddress::Pio(KICK_PORT);
    let fd = guest.machine.fd();
    fd.register_ioevent(&kick, &port, NoDatamatch)
        .expect("ioeventfd");
    group.bench_function("ioeventfd, and a write to a port", |b| {
        b.iter(|| guest.turn());
    });

    let mut guest = Guest::new(&[CONTROLLER, WAIT]);
    let interrupt = event();
    let fd = guest.machine.fd();
    fd.register_irqfd(&interrupt, LINE).expect("irqfd");
    // The controller is set up first: an interrupt lost during the setup would be awaited forever.
    guest.turn();
    group.bench_function("irqfd to the guest's handler and back", |b| {
        b.iter(|| {
            interrupt.write(1).expect("an interrupt");
            guest.turn();
        });
    });

    round_trip(&mut group);
    group.finish();
}

/// A round trip of a driver: a kick to a device's thread, which replies with an interrupt.
fn round_trip(group: &mut criterion::BenchmarkGroup<'_, criterion::measurement::WallTime>) {
    let mut guest = Guest::new(&[CONTROLLER, KICK_AND_WAIT]);
    let (kick, interrupt) = (event(), event());
    let fd = guest.machine.fd();
    let port = IoEventAddress::Pio(KICK_PORT);
    fd.register_ioevent(&kick, &port, NoDatamatch)
        .expect("ioeventfd");
    fd.register_irqfd(&interrupt, LINE).expect("irqfd");
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let device = || {
            while kick.read().is_ok() && !over.load(Ordering::SeqCst) {
                interrupt.write(1).expect("an interrupt");
            }
        };
        let device = scope.spawn(device);
        group.bench_function("ioeventfd to a thread, irqfd back", |b| {
            b.iter(|| guest.turn());
        });
        over.store(true, Ordering::SeqCst);
        kick.write(1).expect("the last kick");
        device.join().expect("the device's thread");
    });
}

criterion_group!(benches, bench);
criterion_main!(benches);
