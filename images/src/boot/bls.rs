//! Boot loader entries: one small file per kernel in `loader/entries`, as systemd-boot and the Fedora family have them.

use super::version;

/// What one entry says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Entry {
    /// What people see.
    pub title: String,
    /// Path of the kernel.
    pub kernel: String,
    /// Paths of the initial RAM disks.
    pub initrds: Vec<String>,
    /// The command line, GRUB's variables dropped.
    pub cmdline: String,
}

/// Reads one entry; `None` when it names no kernel.
pub fn parse(text: &str) -> Option<Entry> {
    let mut entry = Entry::default();
    let mut options: Vec<&str> = Vec::new();
    for line in text.lines() {
        let Some((key, value)) = line.trim().split_once(char::is_whitespace) else { continue };
        let value = value.trim();
        match key {
            "title" => entry.title = value.to_owned(),
            "linux" => entry.kernel = value.to_owned(),
            // GRUB's dialect has several in one line, and variables after them.
            "initrd" => {
                let paths = value.split_whitespace().filter(|path| !path.contains('$'));
                entry.initrds.extend(paths.map(str::to_owned));
            }
            "options" => options.extend(value.split_whitespace().filter(|word| !word.contains('$'))),
            _ => {}
        }
    }
    entry.cmdline = options.join(" ");
    (!entry.kernel.is_empty()).then_some(entry)
}

/// Puts file names of entries in the order in which they are to be tried: newest first, rescue entries not at all.
pub fn order(mut names: Vec<String>) -> Vec<String> {
    names.retain(|name| name.ends_with(".conf") && !name.contains("rescue"));
    names.sort_by(|a, b| version::compare(b, a));
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_and_its_variables() {
        let entry = parse(
            "title Fedora Linux (6.5.6)\nversion 6.5.6\nlinux /vmlinuz-6.5.6\ninitrd /initramfs-6.5.6.img $tuned_initrd\n\
             options root=UUID=ab ro $kernelopts\noptions quiet\ngrub_users $grub_users\n",
        )
        .unwrap();
        assert_eq!(entry.kernel, "/vmlinuz-6.5.6");
        assert_eq!(entry.initrds, ["/initramfs-6.5.6.img"]);
        assert_eq!(entry.cmdline, "root=UUID=ab ro quiet");
        assert_eq!(parse("title x\nefi /shell.efi\n"), None);
        assert_eq!(parse("linux"), None);
    }

    #[test]
    fn newest_first_without_rescue() {
        let names = ["m-6.5.6.conf", "m-6.10.1.conf", "m-0-rescue.conf", "notes.txt"].map(str::to_owned).into();
        assert_eq!(order(names), ["m-6.10.1.conf", "m-6.5.6.conf"]);
    }
}
