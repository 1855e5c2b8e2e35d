//! Selection of one of the images in a file: by the name given by the user, and for this machine.

use crate::Error;
use crate::config::Configuration;
use serde::Deserialize;

/// The platform of an image, in Go's names.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Platform {
    os: String,
    architecture: String,
    pub(crate) variant: Option<String>,
}

/// An image with its names.
pub(crate) struct Named {
    pub(crate) names: Vec<String>,
    /// Distinguishes it from other images.
    pub(crate) id: String,
    pub(crate) variant: Option<String>,
}

/// Selects among several images. Several may remain that are identical, or variants of one.
pub(crate) fn wanted(images: Vec<Named>, tag: Option<&str>) -> Result<Vec<usize>, Error> {
    let all = || {
        let mut all = Vec::new();
        for image in &images {
            match image.names.as_slice() {
                [] => all.extend(image.id.split(' ').next().map(str::to_owned)),
                names => all.extend(names.iter().cloned()),
            }
        }
        all.sort();
        all.dedup();
        all
    };
    let fits = |image: &Named| match tag {
        Some(tag) => image.names.iter().any(|name| is_named(name, tag)),
        None => true,
    };
    let found: Vec<usize> = (0..images.len()).filter(|at| fits(&images[*at])).collect();
    let Some(first) = found.first().map(|at| &images[*at]) else {
        return Err(match tag {
            Some(tag) => Error::Choice {
                reason: format!("holds no image {tag:?}"),
                names: all(),
            },
            None => Error::invalid("it names no image"),
        });
    };
    let is_same = |at: &usize| {
        let image = &images[*at];
        image.id == first.id || image.names == first.names && image.variant != first.variant
    };
    if !found[1..].iter().all(is_same) {
        let reason = match tag {
            Some(tag) => format!("several images are {tag:?}"),
            None => "holds several images; choose one by --tag".to_owned(),
        };
        return Err(Error::Choice {
            reason,
            names: all(),
        });
    }
    Ok(found)
}

/// Whether this name of an image matches the user's: the whole name, the name without Docker's defaults, or the tag alone.
fn is_named(name: &str, wanted: &str) -> bool {
    let short = |name: &str| {
        let name = name.strip_prefix("docker.io/").unwrap_or(name);
        let name = name.strip_prefix("library/").unwrap_or(name);
        let name = name.strip_prefix("localhost/").unwrap_or(name);
        name.to_owned()
    };
    let with_tag = |name: String| match name
        .rsplit('/')
        .next()
        .is_some_and(|last| last.contains([':', '@']))
    {
        true => name,
        false => format!("{name}:latest"),
    };
    let tag = |name: &str| {
        name.rsplit('/')
            .next()?
            .split_once(':')
            .map(|(_, tag)| tag.to_owned())
    };
    name == wanted
        || with_tag(short(name)) == with_tag(short(wanted))
        || tag(name).as_deref() == Some(wanted)
}

/// Go's name of this architecture.
pub(crate) fn machine() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

impl Platform {
    pub(crate) fn of(config: &Configuration) -> Self {
        Self {
            os: config.os.clone().unwrap_or_default(),
            architecture: config.architecture.clone().unwrap_or_default(),
            variant: config.variant.clone(),
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.os.is_empty() && self.architecture.is_empty()
    }

    /// BuildKit's attestations have an unknown platform.
    pub(crate) fn is_unknown(&self) -> bool {
        self.os == "unknown" && self.architecture == "unknown"
    }

    /// Whether this machine can run it. Missing fields match.
    pub(crate) fn fits(&self) -> bool {
        let is_linux = self.os.is_empty() || self.os.eq_ignore_ascii_case("linux");
        is_linux && (self.is_native() || machine() == "amd64" && self.architecture() == "386")
    }

    /// Whether it is for this machine's native architecture, instead of a compatible one.
    pub(crate) fn is_native(&self) -> bool {
        let architecture = self.architecture();
        architecture.is_empty() || architecture == machine()
    }

    /// The architecture in Go's names.
    fn architecture(&self) -> String {
        let name = self.architecture.to_ascii_lowercase();
        match name.as_str() {
            "x86_64" | "x86-64" => "amd64".to_owned(),
            "i386" => "386".to_owned(),
            "aarch64" => "arm64".to_owned(),
            _ => name,
        }
    }

    pub(crate) fn name(&self) -> String {
        let mut name = format!("{}/{}", self.os, self.architecture);
        if let Some(variant) = self.variant.as_ref().filter(|v| !v.is_empty()) {
            name += &format!("/{variant}");
        }
        name
    }

    /// Sort key for variants: the baseline of an architecture comes first.
    pub(crate) fn rank(&self) -> (bool, &str) {
        let variant = self.variant.as_deref().unwrap_or_default();
        (!matches!(variant, "" | "v1" | "v8"), variant)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_mean_what_users_mean() {
        let name = "docker.io/library/busybox:1.36";
        for wanted in [name, "busybox:1.36", "library/busybox:1.36", "1.36"] {
            assert!(is_named(name, wanted), "{wanted}");
        }
        for wanted in ["busybox", "1.3", "box:1.36", "latest"] {
            assert!(!is_named(name, wanted), "{wanted}");
        }
        assert!(is_named("localhost:5000/a:latest", "localhost:5000/a"));
        assert!(is_named("localhost/a:latest", "a"));
    }
}
