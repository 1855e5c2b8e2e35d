//! Events for containerd, in order: one queue and one publishing thread.

use anyhow::{Context, Result};
use containerd_shim_protos::api::ForwardRequest;
use containerd_shim_protos::shim::event::Envelope;
use containerd_shim_protos::shim_sync::{Client, EventsClient};
use koya::vmm::host::sync::lock;
use koya::vmm::host::threads;
use protobuf::well_known_types::any::Any;
use protobuf::well_known_types::timestamp::Timestamp;
use protobuf::{Message, MessageFull};
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, SystemTime};
use ttrpc::context::with_duration;

/// Number of attempts for an event, time limit of each, and pause between them: containerd may be restarting.
const TRIES: u32 = 5;
const TRY_LIMIT: Duration = Duration::from_secs(5);
const PAUSE: Duration = Duration::from_secs(1);

/// The sending end of the queue.
pub(crate) struct Events {
    /// `None` after the end.
    queue: Mutex<Option<Sender<(String, Any)>>>,
    /// Disconnected once all events have been sent.
    sent: Mutex<Receiver<()>>,
}

/// A timestamp in protocol form.
pub(crate) fn timestamp(time: SystemTime) -> Timestamp {
    let since = time
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    Timestamp {
        seconds: since.as_secs() as i64,
        nanos: since.subsec_nanos() as i32,
        ..Default::default()
    }
}

/// A message as `Any`, with the bare type name of containerd's registry.
pub(crate) fn any(name: &str, message: &impl Message) -> Result<Any> {
    Ok(Any {
        type_url: name.into(),
        value: message.write_to_bytes()?,
        ..Default::default()
    })
}

impl Events {
    /// Starts publishing to the socket in TTRPC_ADDRESS; without one (CRI-O), to the log.
    pub(crate) fn start(namespace: &str) -> Result<Self> {
        let (queue, events) = channel();
        let (done, sent) = channel::<()>();
        let address = std::env::var("TTRPC_ADDRESS")
            .ok()
            .filter(|a| !a.is_empty());
        let namespace = namespace.to_owned();
        let work = move || {
            send_all(&events, address.as_deref(), &namespace);
            drop(done);
        };
        threads::spawn("koya-publish", work).context("cannot start a thread")?;
        Ok(Self {
            queue: Mutex::new(Some(queue)),
            sent: Mutex::new(sent),
        })
    }

    /// Queues an event, to be sent after all earlier ones.
    pub(crate) fn publish<E: MessageFull>(&self, topic: &str, event: &E) {
        let name = E::descriptor().full_name().to_owned();
        match any(&name, event) {
            Ok(event) => {
                if let Some(queue) = &*lock(&self.queue) {
                    queue.send((topic.into(), event)).ok();
                }
            }
            Err(error) => log::error!("event {topic}: {error:#}"),
        }
    }

    /// Waits until all events have been sent, up to `limit`.
    pub(crate) fn finish(&self, limit: Duration) {
        drop(lock(&self.queue).take());
        let sent = lock(&self.sent);
        sent.recv_timeout(limit).ok();
    }
}

fn send_all(events: &Receiver<(String, Any)>, address: Option<&str>, namespace: &str) {
    let mut client = None;
    for (topic, event) in events {
        let Some(address) = address else {
            log::info!("event {topic}");
            continue;
        };
        let request = ForwardRequest {
            envelope: Some(Envelope {
                timestamp: Some(timestamp(SystemTime::now())).into(),
                namespace: namespace.into(),
                topic: topic.clone(),
                event: Some(event).into(),
                ..Default::default()
            })
            .into(),
            ..Default::default()
        };
        for attempt in 1..=TRIES {
            match send(&mut client, address, &request) {
                Ok(()) => break,
                Err(error) if attempt == TRIES => log::error!("event {topic} is lost: {error:#}"),
                Err(error) => {
                    log::debug!("event {topic}: {error:#}");
                    client = None;
                    std::thread::sleep(PAUSE);
                }
            }
        }
    }
}

fn send(client: &mut Option<EventsClient>, address: &str, request: &ForwardRequest) -> Result<()> {
    let connected = match client {
        Some(client) => client,
        None => {
            let address = match address.contains("://") {
                true => address.to_owned(),
                false => format!("unix://{address}"),
            };
            client.insert(EventsClient::new(Client::connect(&address)?))
        }
    };
    connected.forward(with_duration(TRY_LIMIT), request)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use containerd_shim_protos::events::task::TaskExit;
    use std::time::Instant;

    #[test]
    fn events_have_containerds_names() {
        assert_eq!(
            TaskExit::descriptor().full_name(),
            "containerd.events.TaskExit"
        );
    }

    #[test]
    fn the_end_waits_until_all_are_sent() {
        let (queue, events) = channel::<(String, Any)>();
        let (done, sent) = channel::<()>();
        let own = Events {
            queue: Mutex::new(Some(queue)),
            sent: Mutex::new(sent),
        };
        own.publish("/tasks/exit", &TaskExit::new());
        let started = Instant::now();
        own.finish(Duration::from_millis(50));
        assert!(started.elapsed() >= Duration::from_millis(50));
        assert_eq!(events.iter().count(), 1);
        drop(done);
        let started = Instant::now();
        own.finish(Duration::from_secs(60));
        assert!(started.elapsed() < Duration::from_secs(30));
    }
}
