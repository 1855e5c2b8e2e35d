//! What is kept of a device while its machine is saved: payloads, each of which says whose it is, and is
//! put together with others by whoever saves the machine.
//!
//! A device is saved when its machine is paused. The transport stops whoever serves the queues (what is
//! under way ends first and is answered), notes how far each queue is, and asks the device for what it
//! has beyond its queues ([`VirtioDevice::save`](super::VirtioDevice::save)). What the host's side is made
//! of (files, taps) is configuration and not in here: it is there before a device is restored.
//!
//! Nothing here knows a device: each states its own [`Schema`], beside the plain data that it describes.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// How the bytes of a payload are read: whose they are, in which version, and whether they mean something
/// on one architecture alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Schema {
    name: &'static str,
    version: u16,
    architecture: Option<&'static str>,
}

impl Schema {
    /// A schema of this name, such as `virtio-blk`, whose version grows with each change of what it describes.
    pub const fn new(name: &'static str, version: u16) -> Self {
        Self {
            name,
            version,
            architecture: None,
        }
    }

    /// The same, for what is the architecture's, such as a CPU's registers.
    #[must_use]
    pub const fn of_this_architecture(self) -> Self {
        Self {
            architecture: Some(std::env::consts::ARCH),
            ..self
        }
    }

    /// State of this schema, as a payload.
    ///
    /// # Errors
    /// [`StateError::Encoding`] if it has no form as JSON.
    pub fn encode(&self, state: &impl Serialize) -> Result<Payload, StateError> {
        Ok(Payload {
            schema: self.name.to_owned(),
            version: self.version,
            architecture: self.architecture.map(str::to_owned),
            bytes: serde_json::to_vec(state).map_err(StateError::Encoding)?,
        })
    }

    /// What a payload of this schema holds.
    ///
    /// # Errors
    /// If it is another's, of another version or architecture, or broken.
    pub fn decode<T: DeserializeOwned>(&self, payload: &Payload) -> Result<T, StateError> {
        if payload.schema != self.name {
            return Err(StateError::Schema {
                wanted: self.name,
                found: payload.schema.clone(),
            });
        }
        if payload.version != self.version {
            return Err(StateError::Version {
                schema: self.name,
                wanted: self.version,
                found: payload.version,
            });
        }
        if payload.architecture.as_deref() != self.architecture {
            let found = payload.architecture.as_deref().unwrap_or("any");
            return Err(StateError::Architecture {
                schema: self.name,
                found: found.to_owned(),
            });
        }
        serde_json::from_slice(&payload.bytes).map_err(StateError::Encoding)
    }
}

/// What is kept of one thing. A device with a [`Schema`] writes and reads it by that; the bytes of
/// another may be whatever it likes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Payload {
    /// Whose it is, and how its bytes are read.
    pub schema: String,
    /// The schema's version.
    pub version: u16,
    /// The architecture, if it is not the same on all.
    pub architecture: Option<String>,
    /// The state itself: base64 where the payload is written as text.
    #[serde(with = "as_base64")]
    pub bytes: Vec<u8>,
}

/// Bytes as text. As a JSON array of numbers they take four times their size, and sixteen times in a payload
/// that is within another.
mod as_base64 {
    use base64::Engine as _;
    use base64::engine::general_purpose::STANDARD;
    use serde::de::Error as _;
    use serde::{Deserialize, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&STANDARD.encode(bytes))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Vec<u8>, D::Error> {
        let text = String::deserialize(deserializer)?;
        STANDARD.decode(text).map_err(D::Error::custom)
    }
}

/// What is kept of a transport: its registers, its queues, and its device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransportState {
    /// The device status (virtio 1.2, section 2.1).
    pub status: u32,
    /// Features that the driver accepted.
    pub driver_features: u64,
    /// Reasons of the interrupt that the driver has not acknowledged.
    pub interrupt_status: u32,
    /// How often the configuration changed.
    pub config_generation: u32,
    /// The registers that select.
    pub queue_select: u32,
    /// See `queue_select`.
    pub features_select: u32,
    /// See `queue_select`.
    pub driver_features_select: u32,
    /// Each queue.
    pub queues: Vec<QueueState>,
    /// The device itself.
    pub device: Payload,
}

impl TransportState {
    /// That of a device behind MMIO registers.
    pub const SCHEMA: Schema = Schema::new("virtio-mmio", 2);
}

/// A queue, and how far the device is in it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueState {
    /// Descriptors.
    pub size: u16,
    /// Whether the driver enabled it.
    pub ready: bool,
    /// Guest physical address of the descriptor table.
    pub descriptors: u64,
    /// Of the available ring.
    pub available: u64,
    /// Of the used ring.
    pub used: u64,
    /// The next entry of the available ring.
    pub next_available: u16,
    /// The next entry of the used ring.
    pub next_used: u16,
}

/// Why a device can't be saved or restored.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum StateError {
    /// A kind of device whose state is not kept yet.
    #[error("a {0} can't be saved")]
    Unsupported(super::DeviceKind),
    /// The state of something else.
    #[error("the state is that of {found:?}, not of {wanted}")]
    Schema {
        /// Whose it should be.
        wanted: &'static str,
        /// Whose it is.
        found: String,
    },
    /// Written by another version.
    #[error("the state of {schema} has version {found}, not {wanted}")]
    Version {
        /// Whose it is.
        schema: &'static str,
        /// The version that is read here.
        wanted: u16,
        /// The version that it has.
        found: u16,
    },
    /// Written on another architecture.
    #[error("the state of {schema} is of architecture {found}")]
    Architecture {
        /// Whose it is.
        schema: &'static str,
        /// Where it was written.
        found: String,
    },
    /// Bytes that are no state.
    #[error("the state can't be read or written")]
    Encoding(#[source] serde_json::Error),
    /// The device was set up otherwise.
    #[error("the state does not fit the device: {0}")]
    Misfit(&'static str),
    /// The device could not go on.
    #[error("the device can't go on")]
    Resume(#[source] Box<dyn std::error::Error + Send + Sync>),
}

impl StateError {
    /// Something that the host refused when a device was to go on.
    pub fn resume(source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self::Resume(source.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SCHEMA: Schema = Schema::new("a-device", 3);

    #[test]
    fn a_payload_is_read_by_its_own_schema_alone() {
        let payload = SCHEMA.encode(&7u64).unwrap();
        assert_eq!(SCHEMA.decode::<u64>(&payload).unwrap(), 7);
        let refused = |schema: Schema, payload: &Payload| {
            let refused = schema.decode::<u64>(payload);
            refused.unwrap_err().to_string()
        };
        let other = refused(Schema::new("another", 3), &payload);
        assert!(other.contains("\"a-device\", not of another"), "{other}");
        let newer = refused(Schema::new("a-device", 4), &payload);
        assert!(newer.contains("version 3, not 4"), "{newer}");
        let broken = Payload {
            bytes: b"{".to_vec(),
            ..payload
        };
        let broken = SCHEMA.decode::<u64>(&broken);
        assert!(matches!(broken, Err(StateError::Encoding(_))));
    }

    #[test]
    fn a_payload_is_short_text_and_survives_it() {
        let bytes: Vec<u8> = (0..=255).collect();
        let payload = Payload {
            schema: "a-device".into(),
            version: 3,
            architecture: None,
            bytes,
        };
        let text = serde_json::to_string(&payload).unwrap();
        assert!(text.len() < 420, "{text}");
        assert_eq!(serde_json::from_str::<Payload>(&text).unwrap(), payload);
        let broken = text.replace("AAEC", "A*EC");
        assert!(serde_json::from_str::<Payload>(&broken).is_err());
    }

    #[test]
    fn what_is_the_architectures_stays_on_it() {
        let schema = SCHEMA.of_this_architecture();
        let mut payload = schema.encode(&7u64).unwrap();
        assert_eq!(schema.decode::<u64>(&payload).unwrap(), 7);
        payload.architecture = Some("pdp11".into());
        let error = schema.decode::<u64>(&payload).unwrap_err();
        assert!(error.to_string().contains("pdp11"), "{error}");
        // Nor is it read as if it were the same on all.
        assert!(SCHEMA.decode::<u64>(&payload).is_err());
    }
}
