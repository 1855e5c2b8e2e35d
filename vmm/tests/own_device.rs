//! Custom devices, driven by a tiny guest on the host's `/dev/kvm`.
#![cfg(target_arch = "x86_64")]

#[path = "../examples/own_device.rs"]
mod example;

use example::GUEST;
use koya_vmm::devices::virtio::{
    ActivateError, Activation, DeviceKind, EventWorker, VirtioDevice, Worker,
};
use koya_vmm::host::threads::{current_role, spawn};
use koya_vmm::{ExitReason, Spec, Vm};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

#[test]
fn the_example_greets_its_guest() {
    let (reason, greetings) = example::run().expect("a tiny guest");
    assert_eq!((reason, greetings), (ExitReason::Reset, 1));
}

/// Reports calls, and waits for permission before it becomes active.
struct Slow {
    said: Sender<String>,
    go_on: Receiver<()>,
}

fn slow() -> (Slow, Receiver<String>, Sender<()>) {
    let (said, hears) = channel();
    let (word, go_on) = channel();
    (Slow { said, go_on }, hears, word)
}

impl Slow {
    fn say(&self, what: &str) {
        let role = current_role().map_or("no role", |role| role.name());
        self.said.send(format!("{what} by {role}")).ok();
    }
}

impl VirtioDevice for Slow {
    fn kind(&self) -> DeviceKind {
        DeviceKind(0x1001)
    }

    fn queue_sizes(&self) -> &[u16] {
        &[8]
    }

    fn activate(&mut self, _activation: Activation) -> Result<Worker, ActivateError> {
        self.say("activated");
        self.go_on.recv().ok();
        let started = spawn("koya-test", || ()).map(|thread| thread.join().is_ok());
        self.say(&format!("started {started:?}"));
        Ok(Worker::OwnThreads)
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn reset(&mut self, _worker: Option<EventWorker>) {
        self.say("reset");
    }
}

#[test]
fn a_device_is_started_by_a_thread_that_may_start_others() {
    let (device, hears, word) = slow();
    let vm = Vm::builder(Spec::flat(GUEST)).device(device);
    let vm = vm.start().expect("a tiny guest");
    assert_eq!(hears.recv().unwrap(), "activated by koya-starter");
    word.send(()).unwrap();
    assert_eq!(hears.recv().unwrap(), "started Ok(true) by koya-starter");
    // Its guest waits for an answer forever.
    assert_eq!(vm.stop(), ExitReason::Stopped);
    assert!(hears.recv().unwrap().starts_with("reset by"));
}

#[test]
fn a_machine_that_ends_while_a_device_starts_is_taken_down_after_it() {
    let (device, hears, word) = slow();
    let vm = Vm::builder(Spec::flat(GUEST)).device(device);
    let vm = vm.start().expect("a tiny guest");
    assert!(hears.recv().unwrap().starts_with("activated"));
    let handle = vm.handle();
    handle.stop();
    let waits = std::thread::spawn(move || vm.wait());
    assert_eq!(handle.wait_exit(), ExitReason::Stopped);
    word.send(()).unwrap();
    assert_eq!(waits.join().unwrap(), ExitReason::Stopped);
    // It was stopped after it had started, and no references to it remain.
    let said: Vec<_> = hears.iter().collect();
    assert!(said[0].starts_with("started Ok(true)"), "{said:?}");
    assert!(said[1].starts_with("reset by"), "{said:?}");
}

/// Never active: the host has nothing left.
struct Refused;

impl VirtioDevice for Refused {
    fn kind(&self) -> DeviceKind {
        DeviceKind(0x1001)
    }

    fn queue_sizes(&self) -> &[u16] {
        &[8]
    }

    fn activate(&mut self, _activation: Activation) -> Result<Worker, ActivateError> {
        Err(ActivateError::Host {
            operation: "open a file",
            source: std::io::Error::other("none is left"),
        })
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn reset(&mut self, _worker: Option<EventWorker>) {}
}

#[test]
fn a_device_that_the_host_cannot_start_is_known_to_the_owner() {
    let vm = Vm::builder(Spec::flat(GUEST)).device(Refused);
    let vm = vm.start().expect("a tiny guest");
    let handle = vm.handle();
    let deadline = Instant::now() + Duration::from_secs(60);
    let failure = loop {
        if let Some(failure) = handle.boot_events().device_failure() {
            break failure;
        }
        assert!(Instant::now() < deadline, "no failure was recorded");
        std::thread::sleep(Duration::from_millis(5));
    };
    assert_eq!(failure.reason, "cannot open a file: none is left");
    // Its guest may have ended already, for want of the device.
    vm.stop();
}
