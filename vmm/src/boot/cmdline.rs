//! The kernel's command line.

use linux_loader::cmdline::Cmdline;

/// Where boot arguments are not given.
pub const DEFAULT: &str = "reboot=k panic=1 console=ttyS0";
/// x86 Linux's `COMMAND_LINE_SIZE`, without the terminator.
pub(super) const MAX_LEN: usize = 2047;

/// What the command line says about `/`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RootDevice {
    /// As the kernel knows it: a device's path, or `PARTUUID=`.
    pub name: String,
    /// Mounted read-only.
    pub read_only: bool,
}

/// Arguments that cannot be passed to a kernel.
#[derive(Debug, thiserror::Error)]
pub enum CmdlineError {
    /// The kernel would read something else.
    #[error("boot_args contain {0:?}: only printable ASCII can be passed to a kernel")]
    Character(char),
    /// Mostly: too long.
    #[error("boot_args make no kernel command line: {0}; it has at most {MAX_LEN} bytes")]
    Line(#[from] linux_loader::cmdline::Error),
}

/// The whole line: `args`, or [`DEFAULT`], and where there is a root device, `root=` unless `args` has it already.
///
/// # Errors
/// Too long, or not printable ASCII.
pub fn compose(args: Option<&str>, root: Option<&RootDevice>) -> Result<String, CmdlineError> {
    let given = with_pci(args.unwrap_or(DEFAULT).trim());
    if let Some(bad) = given.chars().find(|c| !c.is_ascii_graphic() && *c != ' ') {
        return Err(CmdlineError::Character(bad));
    }
    // The crate counts the terminator.
    let mut line = Cmdline::try_from(&given, MAX_LEN + 1)?;
    let names_root = args.is_some_and(|args| args.split_whitespace().any(|arg| arg.starts_with("root=")));
    if let Some(root) = root.filter(|_| !names_root) {
        line.insert("root", &root.name)?;
        line.insert_str(if root.read_only { "ro" } else { "rw" })?;
    }
    let line = line.as_cstring()?;
    Ok(String::from_utf8_lossy(line.as_bytes()).into_owned())
}

/// Without `pci=off`, which nearly every client of Firecracker passes, because devices are not on PCI there unless it is
/// asked for. Here they always are, and a kernel that was told so would find none, not even its disk.
fn with_pci(args: &str) -> String {
    // What follows `--` is for init.
    let (kernel, init) = args.split_at(args.find(" -- ").unwrap_or(args.len()));
    let kept: Vec<_> = kernel.split(' ').filter(|arg| *arg != "pci=off").collect();
    kept.join(" ") + init
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_root_device_is_added_once() {
        let root = RootDevice { name: "/dev/vda".into(), read_only: true };
        assert_eq!(compose(Some("quiet"), Some(&root)).unwrap(), "quiet root=/dev/vda ro");
        assert_eq!(compose(Some("root=/dev/vdb1"), Some(&root)).unwrap(), "root=/dev/vdb1");
        let root = RootDevice { name: "PARTUUID=ab-01".into(), read_only: false };
        assert_eq!(compose(None, Some(&root)).unwrap(), format!("{DEFAULT} root=PARTUUID=ab-01 rw"));
        assert_eq!(compose(Some("quiet -- single"), None).unwrap(), "quiet -- single");
    }

    #[test]
    fn pci_is_not_turned_off() {
        let line = |args: &str| compose(Some(args), None).unwrap();
        assert_eq!(line("console=ttyS0 reboot=k panic=1 pci=off"), "console=ttyS0 reboot=k panic=1");
        assert_eq!(line("pci=off  quiet -- pci=off"), "quiet -- pci=off");
        assert_eq!(line("pci=nomsi xpci=off a  b"), "pci=nomsi xpci=off a  b");
    }

    #[test]
    fn the_longest_line_passes_and_one_byte_more_does_not() {
        assert_eq!(compose(Some(&"x".repeat(MAX_LEN)), None).unwrap().len(), MAX_LEN);
        assert!(compose(Some(&"x".repeat(MAX_LEN + 1)), None).is_err());
        assert!(compose(Some("naïve"), None).is_err());
        assert!(compose(Some("a\nb"), None).is_err());
    }
}
