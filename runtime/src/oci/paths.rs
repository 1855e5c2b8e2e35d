//! Paths that users write.

use crate::Error;
use std::path::Path;

/// An absolute path as text.
///
/// # Errors
/// If it is relative, or not UTF-8.
pub(super) fn absolute<'p>(field: &'static str, path: &'p Path) -> Result<&'p str, Error> {
    if !path.is_absolute() {
        let reason = format!("{} is not an absolute path", path.display());
        return Err(Error::invalid(field, reason));
    }
    text(field, path)
}

/// A path as text, since JSON is text.
pub(super) fn text<'p>(field: &'static str, path: &'p Path) -> Result<&'p str, Error> {
    let reason = || format!("{path:?} is not UTF-8");
    path.to_str().ok_or_else(|| Error::invalid(field, reason()))
}
