//! Finding kernel, initial RAM disk and command line on the volumes of a disk.
//!
//! In this order, first on all volumes one way, then the next: the entry that GRUB would start, GRUB's other entries, boot
//! loader entries, the links `/vmlinuz` and `/initrd.img`, the newest `vmlinuz-*`. What is named but not there, or is no
//! kernel, is passed over with a line in the report.

use super::volume::Volume;
use super::{Boot, MAX_INITRD_LEN, MAX_KERNEL_LEN, bls, grub, is_kernel, version};
use crate::manifest::MAX_CMDLINE_LEN;

/// A kernel that somebody named.
struct Candidate {
    kernel: String,
    initrds: Vec<String>,
    /// `None` when nobody said.
    cmdline: Option<String>,
    /// Who named it.
    by: String,
}

/// Candidates that are tried, so that a menu of a thousand broken entries ends soon.
const MAX_TRIED: usize = 20;

/// Finds what boots; says in `report` what was found, or why nothing was.
pub(super) fn find(volumes: &[Volume], report: &mut Vec<String>) -> Option<Boot> {
    let mut tried = 0;
    for way in [by_grub, by_entries, by_links, by_version] {
        for volume in volumes {
            for candidate in way(volume) {
                tried += 1;
                if tried > MAX_TRIED {
                    report.push("no boot data: too many entries that do not work".to_owned());
                    return None;
                }
                match load(volumes, volume, &candidate) {
                    Ok(boot) => {
                        report.push(describe(&candidate, &boot));
                        return Some(boot);
                    }
                    Err(why) => report.push(format!("{}: {why}", candidate.by)),
                }
            }
        }
    }
    report.push("no boot data: no kernel was found".to_owned());
    None
}

fn describe(candidate: &Candidate, boot: &Boot) -> String {
    let initrd = match candidate.initrds.as_slice() {
        [] => "no initial RAM disk".to_owned(),
        some => some.join(" + "),
    };
    format!("boots {} with {initrd}, as {} says; command line: {}", candidate.kernel, candidate.by, boot.cmdline)
}

fn by_grub(volume: &Volume) -> Vec<Candidate> {
    let mut candidates = Vec::new();
    for dir in ["/boot/grub", "/grub", "/boot/grub2", "/grub2"] {
        let config = format!("{dir}/grub.cfg");
        let Some(text) = volume.text(&config) else { continue };
        let env = volume.text(&format!("{dir}/grubenv")).unwrap_or_default();
        candidates.extend(grub::entries(&text, &env).into_iter().map(|entry| Candidate {
            by: format!("{config}, entry {:?}", entry.title),
            kernel: entry.kernel,
            initrds: entry.initrds,
            cmdline: Some(entry.cmdline),
        }));
    }
    candidates
}

fn by_entries(volume: &Volume) -> Vec<Candidate> {
    let mut candidates = Vec::new();
    for dir in ["/boot/loader/entries", "/loader/entries"] {
        for name in bls::order(volume.names(dir)).into_iter().take(MAX_TRIED) {
            let path = format!("{dir}/{name}");
            let Some(entry) = volume.text(&path).as_deref().and_then(bls::parse) else { continue };
            candidates.push(Candidate {
                by: path,
                kernel: entry.kernel,
                initrds: entry.initrds,
                cmdline: Some(entry.cmdline),
            });
        }
    }
    candidates
}

fn by_links(volume: &Volume) -> Vec<Candidate> {
    let mut candidates = Vec::new();
    for dir in ["", "/boot"] {
        let kernel = format!("{dir}/vmlinuz");
        if volume.has(&kernel) {
            let initrd = format!("{dir}/initrd.img");
            let initrds = if volume.has(&initrd) { vec![initrd] } else { Vec::new() };
            candidates.push(Candidate { by: format!("the link {kernel}"), kernel, initrds, cmdline: None });
        }
    }
    candidates
}

fn by_version(volume: &Volume) -> Vec<Candidate> {
    let mut candidates = Vec::new();
    for dir in ["/boot", ""] {
        let names = volume.names(if dir.is_empty() { "/" } else { dir });
        let mut versions: Vec<&str> = names.iter().filter_map(|name| name.strip_prefix("vmlinuz-")).collect();
        versions.sort_by(|a, b| version::compare(b, a));
        for version in versions {
            let initrds = ["initrd.img-V", "initramfs-V.img", "initrd-V"].map(|name| name.replace('V', version));
            let initrd = initrds.into_iter().find(|name| names.contains(name));
            candidates.push(Candidate {
                kernel: format!("{dir}/vmlinuz-{version}"),
                initrds: initrd.map(|name| format!("{dir}/{name}")).into_iter().collect(),
                cmdline: None,
                by: format!("the newest kernel in {}", if dir.is_empty() { "/" } else { dir }),
            });
        }
    }
    candidates
}

fn load(volumes: &[Volume], volume: &Volume, candidate: &Candidate) -> Result<Boot, String> {
    let read = |path: &str, most: u64| match volume.read(path, most)? {
        Some(bytes) => Ok(bytes),
        None => Err(format!("{path} is not there")),
    };
    let kernel = read(&candidate.kernel, MAX_KERNEL_LEN)?;
    if !is_kernel(&kernel) {
        return Err(format!("{} is not an x86 Linux kernel", candidate.kernel));
    }
    let mut initrd: Vec<u8> = Vec::new();
    for path in &candidate.initrds {
        // The kernel takes several archives one after the other, each at a multiple of four.
        initrd.resize(initrd.len().next_multiple_of(4), 0);
        initrd.append(&mut read(path, MAX_INITRD_LEN - initrd.len() as u64)?);
    }
    let initrd = (!initrd.is_empty()).then_some(initrd);
    let cmdline = complete(volumes, volume, candidate.cmdline.as_deref(), initrd.is_some());
    if cmdline.len() > MAX_CMDLINE_LEN {
        return Err(format!("its command line has {} bytes, and the kernel takes {MAX_CMDLINE_LEN}", cmdline.len()));
    }
    Ok(Boot { kernel, initrd, cmdline })
}

/// The command line with a root file system in it.
fn complete(volumes: &[Volume], volume: &Volume, given: Option<&str>, initrd: bool) -> String {
    let given: String = given.unwrap_or_default().chars().filter(|c| !c.is_control()).collect();
    if given.split_whitespace().any(|word| word.starts_with("root=")) {
        return given;
    }
    let root = volumes.iter().find(|volume| is_root(volume)).unwrap_or(volume);
    let device = match &root.extent.partuuid {
        Some(partuuid) => format!("PARTUUID={partuuid}"),
        // Only user space, in the initial RAM disk, can look for a file system's UUID.
        None if initrd => format!("UUID={}", root.uuid()),
        None => "/dev/vda".to_owned(),
    };
    // What fstab does not speak of stays as the kernel mounts it.
    let mode = if fstab_has_root(root) { "ro" } else { "rw" };
    let said = |word: &str| given.split_whitespace().any(|w| w == word);
    let mode = if said("ro") || said("rw") { String::new() } else { format!(" {mode}") };
    format!("root={device}{mode} {given}").trim_end().to_owned()
}

/// Whether a system lives here, rather than only what starts it.
pub(crate) fn is_root(volume: &Volume) -> bool {
    ["/etc/os-release", "/usr/lib/os-release", "/sbin/init", "/etc/fstab"].iter().any(|path| volume.has(path))
}

fn fstab_has_root(volume: &Volume) -> bool {
    let text = volume.text("/etc/fstab").unwrap_or_default();
    text.lines().any(|line| {
        let mut words = line.split_whitespace();
        words.next().is_some_and(|device| !device.starts_with('#')) && words.next() == Some("/")
    })
}
