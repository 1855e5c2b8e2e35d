//! JSON as programs written in Go exchange it, where null stands for an empty value.

use serde::{Deserialize, Deserializer};

/// Deserializes a member whose value may be null, which means its default: Go writes null for a list or map that was not created.
///
/// # Errors
/// The error of the deserializer.
pub(crate) fn or_null<'de, D, T>(from: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de> + Default,
{
    Ok(Option::deserialize(from)?.unwrap_or_default())
}
