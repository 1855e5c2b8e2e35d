//! Tasks: the containers of one sandbox, with the life cycle of OCI runtimes.
//!
//! A [`TaskSet`] is the core of containerd's shim and of other runtimes: tasks are created from OCI bundles, started,
//! signalled, paused and deleted; exec processes are added to them. The first task starts the virtual machine, which ends
//! with it. Events go to an [`EventSink`].
//!
//! ```no_run
//! use koya_tasks::{CreateTask, Event, EventSink, Spec, StdioConfig, TaskSet, TaskSetConfig};
//! use std::path::PathBuf;
//! use std::sync::Arc;
//!
//! struct Printed;
//! impl EventSink for Printed {
//!     fn send(&self, event: Event) {
//!         eprintln!("{event:?}");
//!     }
//! }
//!
//! let tasks = TaskSet::new(TaskSetConfig::default(), Arc::new(Printed));
//! let bundle = PathBuf::from("bundle");
//! tasks.create(CreateTask {
//!     id: "hello".into(),
//!     spec: Spec::read(&bundle)?,
//!     bundle,
//!     mounts: Vec::new(),
//!     stdio: StdioConfig::default(),
//!     notify: None,
//!     joins: None,
//!     settings: koya::Settings::load()?,
//! })?;
//! tasks.start("hello", "")?;
//! let exit = tasks.wait("hello", "")?;
//! tasks.delete("hello", "")?;
//! tasks.finish();
//! println!("{}", exit.status);
//! # Ok::<(), koya_tasks::Error>(())
//! ```
//!
//! A request blocks its thread while the guest or the host works, but holds no lock: the state has one lock, each process
//! and its streams have their own (`sync::Level` defines the order), and a request that changes a task takes its turn
//! (`set::Turn`). Process-wide effects are limited to functions whose names say so: [`cgroup::enter`] and [`cgroup::leave`]
//! move the process, [`Spec::enter_namespaces`] and [`enter_own_mounts`] its only thread, and [`give_up_privileges`] limits
//! that thread and those that it creates.

mod blocking;
pub mod cgroup;
mod control;
mod create;
mod default_users;
mod durations;
mod environment;
mod error;
mod event;
mod exec;
pub mod hooks;
mod host_limits;
mod joined_users;
mod launcher;
mod lifecycle;
mod listener;
mod logger;
mod machine;
mod memory_policy;
mod mounts;
mod namespaces;
mod notify;
mod oci_compat;
mod overlays;
mod pid_holder;
mod preserved;
mod process;
mod relay;
mod resize;
mod role;
mod set;
pub mod signal;
mod size;
mod spec;
mod stdio;
mod stop;
mod sync;
mod terminate;
#[cfg(test)]
mod tests;
pub mod wire;

pub use blocking::BlockingStream;
pub use create::{CreateTask, SandboxMembership};
pub use default_users::user_name;
pub use durations::parse_duration;
pub use environment::{environment, environment_for};
pub use error::Error;
pub use event::{Event, EventSink};
pub use exec::ExecTask;
pub use joined_users::UserMappings;
pub use launcher::give_up_privileges;
pub use mounts::Mount;
pub use namespaces::{enter_own_mounts, is_in_user_namespace};
pub use notify::NotifySocket;
pub use oci_compat::{read_process, read_resources};
pub use overlays::Overlay;
pub use pid_holder::PidHolder;
pub use preserved::Preserved;
pub use process::{Exit, ExitWatch, Status};
pub use role::Role;
pub use set::{TaskSet, TaskSetConfig, TaskState};
pub use spec::{Files, Spec, is_network_sysctl};
pub use stdio::{StdioConfig, StdioDescriptors, StdioPaths};
pub use terminate::{send_signal, terminate};
