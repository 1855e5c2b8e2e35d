//! The path of one request through a queue, without a guest: the mock driver offers chains; the device's side checks, reads
//! and completes them.
#![allow(missing_docs)] // criterion's macros make public items.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use koya_devices::test_utils::{Buffer, Driver};

/// Number of chains in flight per iteration.
const BATCH: u16 = 64;

fn bench(c: &mut Criterion) {
    let mut group = c.benchmark_group("virtqueue");
    group.throughput(Throughput::Elements(BATCH.into()));
    for (name, size) in [("64 B", 64u32), ("4 KiB", 4096)] {
        group.bench_function(format!("check, read and complete {name}"), |b| {
            let mut driver = Driver::new(256);
            let mut queue = driver.queue();
            let mut bytes = vec![0; size as usize];
            b.iter(|| {
                for _ in 0..BATCH {
                    driver.offer(&[Buffer::Readable(bytes.clone()), Buffer::Writable(size)]);
                }
                while let Some(chain) = queue.pop().expect("a proper driver") {
                    chain
                        .read(queue.memory(), 0, &mut bytes)
                        .expect("what was offered");
                    queue.complete(chain.head(), 16).expect("a proper driver");
                }
                queue.notify().expect("a proper driver");
                driver.recycle();
            });
        });
    }
    group.finish();
}

criterion_group!(benches, bench);
criterion_main!(benches);
