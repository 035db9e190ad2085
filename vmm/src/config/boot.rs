//! What a VM begins with: a kernel with what belongs to it, or firmware.

use std::path::PathBuf;

use bedplate_api::vmm::BootSource;

use crate::boot::{Boot, BootConfig, CmdlineError, RootDevice, compose_cmdline};

/// What no VM can begin with.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum BootSourceError {
    #[error(transparent)]
    Cmdline(#[from] CmdlineError),
    #[error("boot-source names nothing to boot: set kernel_image_path, or firmware_path for a disk with a boot loader")]
    Neither,
    #[error("boot-source names a kernel and firmware: leave kernel_image_path or firmware_path out")]
    Both,
    #[error("boot-source: {0} is for a kernel, and with firmware_path the disk has its own: leave it out")]
    OfKernel(&'static str),
    #[error("boot-source: {0}: the path is empty: name a file")]
    EmptyPath(&'static str),
}

/// Checks a boot source, and composes the command line with the root device `root`.
///
/// # Errors
/// It names neither kernel nor firmware, or both, or what does not belong to the one it names.
pub fn boot_source(source: &BootSource, root: Option<&RootDevice>) -> Result<Boot, BootSourceError> {
    match (&source.kernel_image_path, &source.firmware_path) {
        (Some(kernel), None) => Ok(Boot::Kernel(BootConfig {
            kernel: path("kernel_image_path", kernel)?,
            initrd: source.initrd_path.as_deref().map(|initrd| path("initrd_path", initrd)).transpose()?,
            cmdline: compose_cmdline(source.boot_args.as_deref(), root)?,
        })),
        (None, Some(firmware)) => {
            for (name, field) in [("initrd_path", &source.initrd_path), ("boot_args", &source.boot_args)] {
                if field.is_some() {
                    return Err(BootSourceError::OfKernel(name));
                }
            }
            Ok(Boot::Firmware(path("firmware_path", firmware)?))
        }
        (None, None) => Err(BootSourceError::Neither),
        (Some(_), Some(_)) => Err(BootSourceError::Both),
    }
}

fn path(what: &'static str, path: &str) -> Result<PathBuf, BootSourceError> {
    if path.is_empty() { Err(BootSourceError::EmptyPath(what)) } else { Ok(path.into()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_of_kernel_and_firmware_is_named() {
        let checked = |text: &str| boot_source(&serde_json::from_str(text).unwrap(), None);
        assert!(matches!(checked(r#"{"kernel_image_path": "k"}"#), Ok(Boot::Kernel(_))));
        assert_eq!(checked(r#"{"firmware_path": "f"}"#).unwrap(), Boot::Firmware("f".into()));
        for (text, words) in [
            ("{}", "nothing to boot"),
            (r#"{"kernel_image_path": "k", "firmware_path": "f"}"#, "a kernel and firmware"),
            (r#"{"firmware_path": "f", "boot_args": "quiet"}"#, "boot_args is for a kernel"),
            (r#"{"firmware_path": "f", "initrd_path": "i"}"#, "initrd_path is for a kernel"),
            (r#"{"firmware_path": ""}"#, "firmware_path: the path is empty"),
            (r#"{"kernel_image_path": "k", "initrd_path": ""}"#, "initrd_path: the path is empty"),
        ] {
            let error = checked(text).unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
        }
    }
}
