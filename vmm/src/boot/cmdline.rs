//! The kernel's command line.

use bedplate_devices::virtio::mmio::{Place, WINDOW_LEN};
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

/// The whole line: `args`, or [`DEFAULT`], and where there is a root device, `root=`. The kernel takes the last one.
///
/// # Errors
/// Too long, or not printable ASCII.
pub fn compose(args: Option<&str>, root: Option<&RootDevice>) -> Result<String, CmdlineError> {
    let given = args.unwrap_or(DEFAULT).trim();
    if let Some(bad) = given.chars().find(|c| !c.is_ascii_graphic() && *c != ' ') {
        return Err(CmdlineError::Character(bad));
    }
    // The crate counts the terminator.
    let mut line = Cmdline::try_from(given, MAX_LEN + 1)?;
    if let Some(root) = root {
        line.insert("root", &root.name)?;
        line.insert_str(if root.read_only { "ro" } else { "rw" })?;
    }
    let line = line.as_cstring()?;
    Ok(String::from_utf8_lossy(line.as_bytes()).into_owned())
}

/// Whether the kernel shall do without PCI: `pci=off`, which nearly every client of Firecracker says.
pub fn is_without_pci(line: &str) -> bool {
    let options = kernel_words(line).filter_map(|(_, word)| word.strip_prefix("pci="));
    options.flat_map(|options| options.split(',')).any(|option| option == "off")
}

/// The line with `virtio` in it, by which a kernel that has no ACPI either finds its devices.
pub(super) fn with_virtio(line: &str, virtio: &[Place]) -> String {
    let end = kernel_words(line).last().map_or(0, |(at, word)| at + word.len());
    let (kernel, init) = line.split_at(end);
    let device = |place: &Place| {
        let Place { address, pin } = place;
        format!(" virtio_mmio.device={}K@{address:#x}:{pin}", WINDOW_LEN >> 10)
    };
    let devices: String = virtio.iter().map(device).collect();
    format!("{kernel}{devices}{init}")
}

/// The words that are for the kernel, which end at `--`, with their places. There may be spaces within quotes.
fn kernel_words(line: &str) -> impl Iterator<Item = (usize, &str)> {
    let mut quoted = false;
    let words = line.split(move |c| {
        quoted ^= c == '"';
        c == ' ' && !quoted
    });
    let place = move |word: &str| word.as_ptr() as usize - line.as_ptr() as usize;
    words.take_while(|word| *word != "--").filter(|word| !word.is_empty()).map(move |word| (place(word), word))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_root_device_is_the_one_that_was_configured() {
        let root = RootDevice { name: "/dev/vda".into(), read_only: true };
        assert_eq!(compose(Some("quiet"), Some(&root)).unwrap(), "quiet root=/dev/vda ro");
        assert_eq!(compose(Some("root=/dev/vdb1"), Some(&root)).unwrap(), "root=/dev/vdb1 root=/dev/vda ro");
        let root = RootDevice { name: "PARTUUID=ab-01".into(), read_only: false };
        assert_eq!(compose(None, Some(&root)).unwrap(), format!("{DEFAULT} root=PARTUUID=ab-01 rw"));
        assert_eq!(compose(Some("quiet -- single"), None).unwrap(), "quiet -- single");
    }

    #[test]
    fn a_kernel_without_pci_is_told_of_devices() {
        for without in ["pci=off", "quiet pci=nomsi,off", "a=\"x -- y\" pci=off", "pci=off -- single"] {
            assert!(is_without_pci(without), "{without}");
        }
        for with in ["", "pci=nomsi", "xpci=off", "pci=offer", "-- pci=off", "x=\"a pci=off b\"", "quiet -- pci=off"] {
            assert!(!is_without_pci(with), "{with}");
        }
        let places = [(0xc000_1000, 5), (0xc000_2000, 10)].map(|(address, pin)| Place { address, pin });
        let line = |args: &str| with_virtio(args, &places);
        const DEVICES: &str = "virtio_mmio.device=4K@0xc0001000:5 virtio_mmio.device=4K@0xc0002000:10";
        assert_eq!(line("panic=1 pci=off"), format!("panic=1 pci=off {DEVICES}"));
        assert_eq!(line("pci=off  quiet  -- single"), format!("pci=off  quiet {DEVICES}  -- single"));
        assert_eq!(line("pci=off a=\"x -- y\" b --"), format!("pci=off a=\"x -- y\" b {DEVICES} --"));
    }

    #[test]
    fn the_longest_line_passes_and_one_byte_more_does_not() {
        assert_eq!(compose(Some(&"x".repeat(MAX_LEN)), None).unwrap().len(), MAX_LEN);
        assert!(compose(Some(&"x".repeat(MAX_LEN + 1)), None).is_err());
        assert!(compose(Some("naïve"), None).is_err());
        assert!(compose(Some("a\nb"), None).is_err());
    }
}
