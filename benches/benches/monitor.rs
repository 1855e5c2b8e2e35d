//! Start and end of a virtual machine inside a process: the first instructions of the guest request a reset. The end waits
//! for the kernel (RCU), which is most of the total.
#![allow(missing_docs)] // criterion's macros make public items.

use criterion::{Criterion, criterion_group, criterion_main};
use koya_vmm::{Spec, Vm, kvm};

const RESET: &[u8] = &[0xb0, 0xfe, 0xe6, 0x64, 0xf4];

fn start() -> Vm {
    let vm = Vm::builder(Spec::flat(RESET)).start();
    vm.expect("a virtual machine")
}

fn bench(c: &mut Criterion) {
    if let Err(error) = kvm::open() {
        eprintln!("monitor: skipped: {error}");
        return;
    }
    let mut group = c.benchmark_group("monitor");
    group.bench_function("start to the guest's first exit", |b| {
        b.iter_with_large_drop(|| {
            let vm = start();
            vm.handle().wait_exit();
            vm
        });
    });
    group.bench_function("start to everything taken down", |b| {
        b.iter(|| start().wait());
    });
    group.finish();
}

criterion_group!(benches, bench);
criterion_main!(benches);
