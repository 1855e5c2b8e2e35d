//! Saved state of devices: payloads, each with its schema, to be assembled into the saved state of a machine.
//!
//! A device is saved while its machine is paused. The transport stops serving the queues (requests in flight
//! are completed first), records the ring positions, and asks the device for the rest of its state
//! ([`VirtioDevice::save`](super::VirtioDevice::save)). Host resources (files, taps) are configuration and
//! not part of the state: they exist before a device is restored.
//!
//! This module knows no device: each defines its own [`Schema`] next to the plain data that it describes.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Interpretation of a payload's bytes: the kind of state, the version, and the architecture if it is specific to one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Schema {
    name: &'static str,
    version: u16,
    architecture: Option<&'static str>,
}

impl Schema {
    /// A schema with a name such as `virtio-blk` and a version, which is incremented with each change of the
    /// data.
    pub const fn new(name: &'static str, version: u16) -> Self {
        Self {
            name,
            version,
            architecture: None,
        }
    }

    /// The same for architecture-specific state, such as CPU registers.
    #[must_use]
    pub const fn architecture_specific(self) -> Self {
        Self {
            architecture: Some(std::env::consts::ARCH),
            ..self
        }
    }

    /// Encodes state as a payload.
    ///
    /// # Errors
    /// [`StateError::Encoding`] if the state cannot be represented as JSON.
    pub fn encode(&self, state: &impl Serialize) -> Result<Payload, StateError> {
        Ok(Payload {
            schema: self.name.to_owned(),
            version: self.version,
            architecture: self.architecture.map(str::to_owned),
            bytes: serde_json::to_vec(state).map_err(StateError::Encoding)?,
        })
    }

    /// Decodes a payload of this schema.
    ///
    /// # Errors
    /// If the schema, version or architecture differs, or the bytes are invalid.
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

/// Saved state. A device with a [`Schema`] encodes and decodes it with that; other devices may use any bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Payload {
    /// Name of the schema.
    pub schema: String,
    /// Version of the schema.
    pub version: u16,
    /// Architecture, for state that is specific to one.
    pub architecture: Option<String>,
    /// The state; base64 when the payload is written as text.
    #[serde(with = "as_base64")]
    pub bytes: Vec<u8>,
}

/// Bytes as base64. As a JSON array of numbers they take four times their size, and sixteen times in a
/// payload nested in another.
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

/// State of a transport: its registers, its queues and its device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransportState {
    /// The device status (virtio 1.2, section 2.1).
    pub status: u32,
    /// Features that the driver accepted.
    pub driver_features: u64,
    /// Interrupt reasons that the driver has not acknowledged.
    pub interrupt_status: u32,
    /// Number of configuration changes.
    pub config_generation: u32,
    /// Selector register.
    pub queue_select: u32,
    /// Selector register.
    pub features_select: u32,
    /// Selector register.
    pub driver_features_select: u32,
    /// Each queue.
    pub queues: Vec<QueueState>,
    /// The device itself.
    pub device: Payload,
}

impl TransportState {
    /// Schema of a device with MMIO registers.
    pub const SCHEMA: Schema = Schema::new("virtio-mmio", 2);
}

/// A queue and the device's position in it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueState {
    /// Number of descriptors.
    pub size: u16,
    /// Whether the driver enabled it.
    pub ready: bool,
    /// Guest physical address of the descriptor table.
    pub descriptors: u64,
    /// Guest physical address of the available ring.
    pub available: u64,
    /// Guest physical address of the used ring.
    pub used: u64,
    /// The next entry of the available ring.
    pub next_available: u16,
    /// The next entry of the used ring.
    pub next_used: u16,
}

/// Errors when a device is saved or restored.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum StateError {
    /// The state of this kind of device cannot be saved yet.
    #[error("a {0} can't be saved")]
    Unsupported(super::DeviceKind),
    /// The state has another schema.
    #[error("the state is that of {found:?}, not of {wanted}")]
    Schema {
        /// The expected schema.
        wanted: &'static str,
        /// The schema found.
        found: String,
    },
    /// The state has another version.
    #[error("the state of {schema} has version {found}, not {wanted}")]
    Version {
        /// The schema.
        schema: &'static str,
        /// The supported version.
        wanted: u16,
        /// The version found.
        found: u16,
    },
    /// The state was saved on another architecture.
    #[error("the state of {schema} is of architecture {found}")]
    Architecture {
        /// The schema.
        schema: &'static str,
        /// The architecture found.
        found: String,
    },
    /// The bytes cannot be encoded or decoded.
    #[error("the state can't be read or written")]
    Encoding(#[source] serde_json::Error),
    /// The state does not fit the device's configuration.
    #[error("the state does not fit the device: {0}")]
    Mismatch(&'static str),
    /// The device could not resume.
    #[error("the device can't go on")]
    Resume(#[source] Box<dyn std::error::Error + Send + Sync>),
}

impl StateError {
    /// A resource that the host refused on resume.
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
    fn architecture_specific_state_is_refused_elsewhere() {
        let schema = SCHEMA.architecture_specific();
        let mut payload = schema.encode(&7u64).unwrap();
        assert_eq!(schema.decode::<u64>(&payload).unwrap(), 7);
        payload.architecture = Some("pdp11".into());
        let error = schema.decode::<u64>(&payload).unwrap_err();
        assert!(error.to_string().contains("pdp11"), "{error}");
        // It is not read as architecture-independent state either.
        assert!(SCHEMA.decode::<u64>(&payload).is_err());
    }
}
