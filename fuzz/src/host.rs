//! Data that the host reads from others: replies of an agent, configurations, settings, tables of mounts.

use crate::directories::{Contents, Directory};
use crate::input::Input;
use koya::internals::{adapted, ask_agent, volume_in_memory};
use koya::{Bundle, Settings, SharedNamespaces, SharedPidNamespace};
use koya_protocol::messages::{Accounts, ContainerStats, GuestTimes, OomEvent, Refusal};
use koya_tasks::wire::Wire;
use protobuf::Message as _;
use rustix::io::Errno;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use ttrpc::proto::{Any, Response, Status};

/// Above the length of any message about an agent, and below that of a text from the agent.
const MAX_TEXT: usize = 6 << 10;

/// An agent with arbitrary replies, which hangs up at some point.
///
/// # Panics
/// If the host's side has a bug.
pub fn agent_answers(data: &[u8]) {
    let mut input = Input::new(data);
    let count = usize::from(input.byte() % 6) + 1;
    let asked = input.bytes(count);
    let (ours, theirs) = UnixStream::pair().expect("sockets");
    let refusals = std::thread::scope(|scope| {
        scope.spawn(move || while answer(&theirs, &mut input).is_some() {});
        ask_agent(ours, asked)
    });
    for text in refusals {
        assert!(!text.contains(char::is_control), "{text:?}");
        assert!(text.len() < MAX_TEXT, "{} bytes", text.len());
    }
}

/// Answers one request; returns `None` if the agent hangs up after it.
fn answer(mut stream: &UnixStream, input: &mut Input<'_>) -> Option<()> {
    let mut header = [0; 10];
    stream.read_exact(&mut header).ok()?;
    let len = u32::from_be_bytes(header[..4].try_into().ok()?);
    stream.read_exact(&mut vec![0; len as usize]).ok()?;
    if input.is_empty() {
        return None;
    }
    let kind = input.byte();
    let payload = match kind % 4 {
        0 => input.bytes(64).to_vec(),
        _ => response(input).write_to_bytes().ok()?,
    };
    // One byte of the length, the stream number or the type may be wrong.
    let odd = kind >= 224;
    header[..4].copy_from_slice(&(payload.len() as u32).to_be_bytes());
    header[8] = 2;
    if odd {
        let at = usize::from(input.byte() % 10);
        header[at] = match at {
            // ttrpc discards what is too long in parts of 4 KiB, also after the agent has hung up: 16 MiB are enough beyond
            // its limit of 4 MiB, and 4 GiB would take a million system calls.
            0 => input.byte() & 1,
            _ => input.byte(),
        };
    }
    stream.write_all(&[&header[..], &payload].concat()).ok()?;
    (!odd).then_some(())
}

fn response(input: &mut Input<'_>) -> Response {
    let mut response = Response::new();
    let kind = input.byte();
    if kind % 8 < 4 {
        let detail = Refusal {
            kind: protobuf::EnumOrUnknown::from_i32((kind / 8).into()),
            reason: text(input),
            exit_status: input.long() as i32,
            ..Default::default()
        };
        let names = ["koya.Refusal", "koya.Refusal", "other"];
        response.set_status(Status {
            code: protobuf::EnumOrUnknown::from_i32(i32::from(input.byte() % 18)),
            message: text(input),
            details: vec![Any {
                type_url: input.pick(&names).into(),
                value: match kind {
                    128.. => input.bytes(32).to_vec(),
                    _ => detail.write_to_bytes().unwrap_or_default(),
                },
                ..Default::default()
            }],
            ..Default::default()
        });
        return response;
    }
    let message: Box<dyn protobuf::MessageDyn> = match kind / 8 % 6 {
        0 => Box::new(ContainerStats {
            pids_current: input.number(),
            cpu_usage_usec: input.number(),
            memory_usage: input.number(),
            ..Default::default()
        }),
        1 => Box::new(GuestTimes {
            agent_started_ns: input.number(),
            agent_connected_ns: input.number(),
            ..Default::default()
        }),
        2 => Box::new(OomEvent {
            container_id: text(input),
            ..Default::default()
        }),
        3 => Box::new(Accounts::default()),
        _ => {
            response.payload = input.bytes(64).to_vec();
            return response;
        }
    };
    response.payload = message.write_to_bytes_dyn().unwrap_or_default();
    response
}

/// Text with control characters, up to the maximum length of a message.
fn text(input: &mut Input<'_>) -> String {
    let kind = input.byte();
    let bytes = input.bytes(usize::from(kind % 32));
    let text = String::from_utf8_lossy(bytes).into_owned();
    match kind {
        240.. => text.repeat(2000),
        200.. => format!("\x1b[2J{text}\r\n\u{202e}"),
        _ => text,
    }
}

/// A value that is valid for some field.
fn value(input: &mut Input<'_>) -> Value {
    let kind = input.byte();
    match kind % 20 {
        0 => Value::Null,
        1 => json!(kind > 127),
        2 => json!(input.number()),
        3 => json!(-i64::from(input.byte())),
        4 => json!(String::from_utf8_lossy(input.bytes(12))),
        5 => json!(input.pick(&[
            "0-3",
            "0,99999",
            "max",
            "rslave",
            "private",
            "unconfined",
            "1000:5"
        ])),
        6 => json!(input.pick(&[
            "/",
            "",
            ".",
            "..",
            "/a/../..",
            "hosts",
            "/dev/shm",
            "/proc/1/ns/pid"
        ])),
        7 => json!(input.pick(&[
            "pid", "network", "ipc", "user", "mount", "cgroup", "uts", "time"
        ])),
        8 => json!(input.pick(&[
            "RLIMIT_NOFILE",
            "CAP_SYS_ADMIN",
            "SCMP_ACT_KILL",
            "net.core.x"
        ])),
        9 => json!([]),
        10 => json!({}),
        11 => json!([value(input)]),
        12 => json!([value(input), value(input)]),
        13 => json!({"destination": value(input), "type": input.pick(&["bind", "tmpfs", "proc"]),
            "source": value(input), "options": [value(input), "rbind", "ro"]}),
        14 => json!({"type": value(input), "path": value(input)}),
        15 => {
            json!({"path": input.pick(&["/dev/x", "/dev/../etc", "x"]), "type": input.pick(&["c", "b", "p", "u"]),
            "major": input.number(), "minor": input.byte(), "fileMode": input.word()})
        }
        16 => json!({"allow": kind > 127, "access": input.pick(&["rwm", "r", "", "x"]),
            "type": input.pick(&["a", "b", "c"]), "major": value(input), "minor": value(input)}),
        17 => json!({"containerID": input.number() as u32, "hostID": input.number() as u32,
            "size": input.number() as u32}),
        18 => json!({"type": "RLIMIT_NOFILE", "soft": input.number(), "hard": input.number()}),
        _ => json!({"path": "/bin/true", "args": [value(input)], "timeout": value(input)}),
    }
}

const FIELDS: [&str; 42] = [
    "/ociVersion",
    "/hostname",
    "/domainname",
    "/annotations",
    "/mounts",
    "/mounts/0",
    "/mounts/-",
    "/hooks",
    "/hooks/prestart",
    "/hooks/poststop",
    "/root",
    "/root/path",
    "/root/readonly",
    "/process",
    "/process/args",
    "/process/cwd",
    "/process/env",
    "/process/user/uid",
    "/process/user/umask",
    "/process/user/additionalGids",
    "/process/user/username",
    "/process/rlimits",
    "/process/capabilities/bounding",
    "/process/apparmorProfile",
    "/process/selinuxLabel",
    "/process/terminal",
    "/process/consoleSize",
    "/process/execCPUAffinity",
    "/process/ioPriority",
    "/process/scheduler",
    "/linux/namespaces",
    "/linux/namespaces/-",
    "/linux/uidMappings",
    "/linux/gidMappings",
    "/linux/sysctl",
    "/linux/devices",
    "/linux/resources/devices",
    "/linux/resources/memory",
    "/linux/resources/cpu",
    "/linux/maskedPaths",
    "/linux/rootfsPropagation",
    "/linux/seccomp",
];

/// Sets a field, if its parent exists.
fn set(document: &mut Value, pointer: &str, value: Value) {
    let Some((parent, name)) = pointer.rsplit_once('/') else {
        return;
    };
    match document.pointer_mut(parent) {
        Some(Value::Object(fields)) => {
            fields.insert(name.into(), value);
        }
        Some(Value::Array(items)) if name == "-" => items.push(value),
        Some(Value::Array(items)) => {
            if let Some(item) = name.parse::<usize>().ok().and_then(|at| items.get_mut(at)) {
                *item = value;
            }
        }
        _ => {}
    }
}

/// Contents of a bundle.
static BUNDLE: Contents = Contents {
    name: "bundle",
    changing: &[],
    set_up: |dir| {
        std::fs::create_dir(dir.join("rootfs"))?;
        std::fs::write(dir.join("hosts"), "")
    },
    fill: |_| Ok(()),
};

/// OCI configurations with arbitrary fields, and the accounts of an image.
///
/// # Panics
/// If the host's side has a bug, or the host cannot create a directory.
pub fn oci_configurations(data: &[u8]) {
    let mut input = Input::new(data);
    let mut document = json!({
        "ociVersion": "1.2.0",
        "process": {"user": {"uid": 0, "gid": 0}, "args": ["sh"], "cwd": "/", "capabilities": {}},
        "root": {"path": "rootfs"},
        "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}],
        "hooks": {},
        "linux": {"namespaces": [{"type": "pid"}, {"type": "mount"}], "resources": {}},
    });
    for _ in 0..input.byte() % 8 {
        let field = input.pick(&FIELDS);
        let value = value(&mut input);
        set(&mut document, field, value);
    }
    let Ok(spec) = serde_json::from_value(document) else {
        return;
    };
    let mut dir = Directory::take(&BUNDLE);
    // A configuration is only read.
    dir.set_unchanged();
    let rootfs = dir.at("rootfs");
    let pids = match input.byte() % 3 {
        0 => SharedPidNamespace::Unknown,
        1 => SharedPidNamespace::Sandbox,
        _ => SharedPidNamespace::Container("other".into()),
    };
    let bundle = Bundle {
        spec,
        directory: dir.path().into(),
        rootfs,
        shared: SharedNamespaces {
            pids,
            ..SharedNamespaces::default()
        },
    };
    let half = usize::from(input.byte());
    let passwd = String::from_utf8_lossy(input.bytes(half)).into_owned();
    let groups = String::from_utf8_lossy(input.rest()).into_owned();
    if let Ok((text, shares)) = adapted("c", bundle, passwd, groups) {
        let spec: koya::oci_spec::runtime::Spec = serde_json::from_str(&text).expect("a spec");
        assert!(spec.process().is_some());
        assert!(shares.iter().all(|path| path.is_absolute()), "{shares:?}");
    }
}

/// Settings of a machine, and annotations that may change only some of them.
///
/// # Panics
/// If an annotation changes another setting.
pub fn settings(data: &[u8]) {
    let mut input = Input::new(data);
    let len = usize::from(input.byte());
    let text = String::from_utf8_lossy(input.bytes(len)).into_owned();
    let Ok(machine) = Settings::parse(&[("a".into(), text)]) else {
        return;
    };
    let mut machine = machine;
    machine.annotations = vec!["cpus".into(), "memory_mib".into(), "block_volumes".into()];
    let keys = [
        "cpus",
        "memory_mib",
        "kernel",
        "block_volumes",
        "annotations",
        "cmdline",
    ];
    let mut annotations = BTreeMap::new();
    for _ in 0..input.byte() % 4 {
        let key = format!("io.koya.{}", input.pick(&keys));
        let len = usize::from(input.byte() % 64);
        let value = String::from_utf8_lossy(input.bytes(len)).into_owned();
        annotations.insert(key, value);
    }
    if let Ok(with) = machine.clone().with_annotations(&annotations) {
        let fixed = |settings: &Settings| {
            let Settings {
                kernel,
                initramfs,
                cmdline,
                annotations,
                ..
            } = settings.clone();
            (kernel, initramfs, cmdline, annotations)
        };
        assert_eq!(fixed(&with), fixed(&machine));
    }
    machine
        .block_volumes(Some(&annotations.into_iter().collect()))
        .ok();
}

/// Tables of mounts, and lists and sizes as written by users.
///
/// # Panics
/// If a result is invalid.
pub fn host_texts(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let source = Path::new("/var/lib/kubelet/pods/u/volumes/kubernetes.io~empty-dir/fast/a");
    if let Some((volume, within)) = volume_in_memory(&text, source) {
        assert!(volume.to_string_lossy().contains("/volumes/"));
        assert!(within.is_relative() && !within.starts_with(".."));
    }
    if let Ok(cpus) = koya_protocol::cpus::parse(&text) {
        assert!(cpus.iter().all(|cpu| *cpu < koya_protocol::cpus::MAX_CPUS));
    }
    koya::parse_size(&text);
    koya_vmm::guest_text::sanitize_line(data);
    let lines = koya_vmm::guest_text::sanitize_lines(data);
    assert!(lines.len() <= koya_vmm::guest_text::MAX_LINES);
    crate::assert_plain(&koya_vmm::guest_text::sanitize(data));
}

/// Minimum number of descriptors accepted with a line: the standard streams.
const STREAMS: usize = 3;

/// Lines to a control socket, in pieces of any length, with descriptors.
///
/// # Panics
/// If they are not received correctly, or the host is out of descriptors.
pub fn control_lines(data: &[u8]) {
    let mut input = Input::new(data);
    let (ours, theirs) = UnixStream::pair().expect("sockets");
    let file = File::open("/dev/null").expect("a descriptor");
    let (mut sent, mut count) = (Vec::new(), 0);
    while !input.is_empty() {
        let choice = input.byte();
        let fds = vec![file.as_fd(); usize::from(choice % 8).min(STREAMS)];
        let piece = input.bytes(usize::from(choice / 8) + 1);
        if piece.is_empty() || sent.len() + piece.len() > MAX_TEXT {
            break;
        }
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(STREAMS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            control.push(SendAncillaryMessage::ScmRights(&fds));
        }
        let bytes = [IoSlice::new(piece)];
        match sendmsg(&theirs, &bytes, &mut control, SendFlags::DONTWAIT) {
            Ok(len) => assert_eq!(len, piece.len()),
            // Each message takes room of its own, however short.
            Err(error) => {
                assert_eq!(error, Errno::WOULDBLOCK);
                break;
            }
        }
        sent.extend_from_slice(piece);
        count += fds.len();
    }
    drop(theirs);
    let mut lines = sent.split_inclusive(|byte| *byte == b'\n');
    let (mut wire, mut received) = (Wire::new(ours), 0);
    loop {
        match wire.receive::<Value>() {
            Ok(Some((message, fds))) => {
                let line = lines.next().expect("a line was sent");
                let expected: Value = serde_json::from_slice(line).expect("a message");
                assert!(line.ends_with(b"\n") && message == expected);
                received += fds.len();
            }
            Ok(None) => {
                assert!(lines.next().is_none(), "a line is lost");
                break;
            }
            Err(_) => break,
        }
    }
    assert!(received <= count, "{received} descriptors of {count}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_may_be_full_of_short_messages() {
        // Two bytes each: no descriptors, and one byte of the line.
        control_lines(&b"\x00 ".repeat(1000));
        control_lines(&b"\x01\n".repeat(1000));
    }
}
