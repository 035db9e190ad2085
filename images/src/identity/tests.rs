//! Disks with a system in them, made, changed and read by the real e2fsprogs.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::PathBuf;
use std::process::{Command, Output};

use super::*;
use crate::fixtures::noise;

const MIB: u64 = 1 << 20;

/// Where the first partition begins.
const START: u64 = MIB;

/// Length of each partition.
const LEN: u64 = 48 * MIB;

/// What a secret begins with; what follows is another number in each file.
const SECRET: &str = "secret-9f31c7-";

/// Tells why a test does nothing where e2fsprogs is not installed.
fn ready() -> bool {
    let there = Command::new("/usr/sbin/mke2fs").arg("-V").output().is_ok();
    if !there {
        eprintln!("skipped: e2fsprogs is not installed");
    }
    there
}

/// A folder that becomes a disk.
struct Maker {
    dir: tempfile::TempDir,
}

impl Maker {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    fn disk(&self) -> PathBuf {
        self.dir.path().join("disk")
    }

    fn write(&self, path: &str, bytes: impl AsRef<[u8]>) {
        let path = self.dir.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }

    /// A file with a secret of its own, longer than a block, so that it ends in the middle of one.
    fn secret(&self, path: &str) {
        let number = u32::from_le_bytes(*blake3::hash(path.as_bytes()).as_bytes().first_chunk().unwrap());
        self.write(path, format!("{SECRET}{number}\n").repeat(200));
    }

    /// What a Debian that has run has in its root file system, below `top`.
    fn system(&self, top: &str) {
        let at = |path: &str| format!("{top}/{path}");
        self.write(&at("etc/os-release"), "PRETTY_NAME=\"Test\"\n");
        self.write(&at("etc/passwd"), "root:x:0:0::/root:/bin/sh\n");
        self.write(&at("etc/ssh/sshd_config"), "Port 22\n");
        self.write(&at("usr/bin/tool"), noise(1, 3 << 20));
        self.write(&at("root/.bashrc"), "true\n");
        for (path, _) in TRACES {
            self.secret(&at(path));
        }
        self.write(&at("etc/machine-id"), format!("{SECRET}0000000000000000000\n"));
        self.write(&at("var/log/empty"), "");
        self.write(&at("var/lib/cloud/scripts/per-boot/mine"), "#!/bin/sh\n");
        let link = self.dir.path().join(at("var/lib/cloud/instance"));
        symlink("/var/lib/cloud/instances/i-1", link).unwrap();
        fs::create_dir_all(self.dir.path().join(at("var/lib/dbus"))).unwrap();
        symlink("/etc/machine-id", self.dir.path().join(at("var/lib/dbus/machine-id"))).unwrap();
        // Nothing is followed out of where the rules look.
        symlink("/etc/passwd", self.dir.path().join(at("var/log/passwd.1"))).unwrap();
        symlink("/etc", self.dir.path().join(at("var/lib/cloud/sem/etc"))).unwrap();
    }

    /// Writes the folders into an MBR disk, each as a file system of one partition.
    fn build(&self, folders: &[&str], options: &[&str]) {
        let mut first = [0; 512];
        for (index, _) in folders.iter().enumerate() {
            let start = (START + index as u64 * LEN) / 512;
            let entry = &mut first[446 + 16 * index..][..16];
            entry[4] = 0x83;
            entry[8..12].copy_from_slice(&(start as u32).to_le_bytes());
            entry[12..16].copy_from_slice(&((LEN / 512) as u32).to_le_bytes());
        }
        first[510..].copy_from_slice(&[0x55, 0xaa]);
        let disk = fs::File::create(self.disk()).unwrap();
        disk.set_len(START + LEN * folders.len() as u64 + MIB).unwrap();
        disk.write_all_at(&first, 0).unwrap();
        for (index, folder) in folders.iter().enumerate() {
            let offset = format!("offset={}", START + index as u64 * LEN);
            let mut mke2fs = Command::new("/usr/sbin/mke2fs");
            mke2fs.args(["-q", "-F", "-E", &offset, "-d"]).arg(self.dir.path().join(folder)).args(options);
            succeed(mke2fs.arg(self.disk()).arg(format!("{}k", LEN / 1024)));
        }
    }

    /// The first partition, as e2fsprogs wants it.
    fn part(&self) -> String {
        format!("{}?offset={START}", self.disk().display())
    }

    fn debugfs(&self, script: &str) -> String {
        self.write("script", script);
        let script = self.dir.path().join("script");
        let out = succeed(Command::new("/usr/sbin/debugfs").args(["-w", "-f"]).arg(script).arg(self.part()));
        String::from_utf8_lossy(&out.stdout).into_owned()
    }

    fn is_clean(&self) -> bool {
        Command::new("/usr/sbin/e2fsck").args(["-f", "-n"]).arg(self.part()).output().unwrap().status.success()
    }

    /// Whether the raw file has these bytes anywhere.
    fn has(&self, text: &str) -> bool {
        // A search of our own would take most of the tests' time.
        Command::new("grep").args(["-q", "-a", "-F", text]).arg(self.disk()).status().unwrap().success()
    }

    /// What `stat` of debugfs says of each file, and its content's length.
    fn files(&self) -> BTreeMap<String, String> {
        let out = self.dir.path().join("out");
        let _removed = fs::remove_dir_all(&out);
        fs::create_dir(&out).unwrap();
        self.debugfs(&format!("rdump / {}\n", out.display()));
        let mut files = BTreeMap::new();
        let mut dirs = vec![out.clone()];
        while let Some(dir) = dirs.pop() {
            for entry in fs::read_dir(dir).unwrap() {
                let path = entry.unwrap().path();
                let meta = path.symlink_metadata().unwrap();
                let content = match () {
                    () if meta.is_symlink() => fs::read_link(&path).unwrap().display().to_string(),
                    () if meta.is_dir() => {
                        dirs.push(path.clone());
                        "directory".to_owned()
                    }
                    () => blake3::hash(&fs::read(&path).unwrap()).to_string(),
                };
                let mode = meta.permissions().mode();
                let name = path.strip_prefix(&out).unwrap().display().to_string();
                files.insert(name, format!("{mode:o} {content}"));
            }
        }
        files
    }
}

fn succeed(command: &mut Command) -> Output {
    let out = command.output().unwrap();
    assert!(out.status.success(), "{command:?}: {}", String::from_utf8_lossy(&out.stderr));
    out
}

/// Every kind of trace; all but the machine id have a secret in them.
const TRACES: &[(&str, TraceKind)] = &[
    ("etc/machine-id", TraceKind::MachineId),
    ("etc/ssh/ssh_host_ed25519_key", TraceKind::HostKey),
    ("etc/ssh/ssh_host_ed25519_key.pub", TraceKind::HostKey),
    ("etc/ssh/ssh_host_rsa_key", TraceKind::HostKey),
    ("home/ada/.bash_history", TraceKind::History),
    ("root/.bash_history", TraceKind::History),
    ("root/.lesshst", TraceKind::History),
    ("root/.python_history", TraceKind::History),
    ("root/.viminfo", TraceKind::History),
    ("var/lib/NetworkManager/internal-0a-eth0.lease", TraceKind::Lease),
    ("var/lib/NetworkManager/secret_key", TraceKind::Lease),
    ("var/lib/cloud/data/instance-id", TraceKind::CloudInit),
    ("var/lib/cloud/instances/i-1/sem/config_ssh", TraceKind::CloudInit),
    ("var/lib/cloud/instances/i-1/user-data.txt", TraceKind::CloudInit),
    ("var/lib/cloud/sem/config_scripts_per_once.once", TraceKind::CloudInit),
    ("var/lib/dhcp/dhclient.eth0.leases", TraceKind::Lease),
    ("var/lib/dhcpcd/eth0.lease", TraceKind::Lease),
    ("var/lib/systemd/coredump/core.sshd.0", TraceKind::Log),
    ("var/lib/systemd/credential.secret", TraceKind::Seed),
    ("var/lib/systemd/random-seed", TraceKind::Seed),
    ("var/log/apt/history.log", TraceKind::Log),
    ("var/log/journal/0a1b/system.journal", TraceKind::Log),
    ("var/log/journal/0a1b/user-1000@000a-000b.journal~", TraceKind::Log),
    ("var/log/syslog", TraceKind::Log),
    ("var/log/syslog.1", TraceKind::Log),
    ("var/log/syslog.2.gz", TraceKind::Log),
];

/// The traces above and the links that go with them, sorted.
fn expected() -> Vec<Trace> {
    let mut all: Vec<Trace> =
        TRACES.iter().map(|(path, kind)| Trace { kind: *kind, path: format!("/{path}") }).collect();
    for link in ["/var/lib/cloud/instance", "/var/lib/cloud/sem/etc"] {
        all.push(Trace { kind: TraceKind::CloudInit, path: link.to_owned() });
    }
    all.sort();
    all
}

fn sorted(mut traces: Vec<Trace>) -> Vec<Trace> {
    traces.sort();
    traces
}

#[test]
fn everything_of_one_machine_goes_and_nothing_else_does() {
    if !ready() {
        return;
    }
    for options in [
        &["-t", "ext4"][..],
        &["-t", "ext4", "-b", "4096", "-O", "metadata_csum,64bit"],
        &["-t", "ext3"],
        &["-t", "ext2"],
    ] {
        let maker = Maker::new();
        maker.system("root");
        maker.build(&["root"], options);
        maker.debugfs(
            "sif /var/log/syslog uid 104\nsif /var/log/syslog gid 4\nsif /var/log/syslog mode 0100640\n\
             ea_set /var/log/syslog user.note kept\n",
        );
        let before = maker.files();
        assert!(maker.has(SECRET));
        assert_eq!(sorted(find(&maker.disk()).unwrap()), expected(), "{options:?}");
        let about = |maker: &Maker| maker.disk().metadata().map(|meta| (meta.len(), meta.uid(), meta.mode())).unwrap();
        let same = about(&maker);

        let report = remove(&maker.disk()).unwrap();
        assert_eq!(sorted(report.removed), expected());
        assert_eq!(report.left, []);
        assert!(report.notes.iter().any(|note| note.contains("ssh-keygen -A")), "{:?}", report.notes);
        assert!(!maker.has(SECRET), "{options:?}");
        assert!(maker.is_clean());
        assert_eq!(about(&maker), same);

        let mut wanted = before.clone();
        let empty = blake3::hash(b"").to_string();
        for trace in expected() {
            let path = &trace.path[1..];
            match path {
                "etc/machine-id" | "var/log/apt/history.log" | "var/log/syslog" => {
                    let mode = wanted[path].split_once(' ').unwrap().0.to_owned();
                    wanted.insert(path.to_owned(), format!("{mode} {empty}"));
                }
                path => assert!(wanted.remove(path).is_some(), "{path}"),
            }
        }
        for dir in ["var/log/journal/0a1b", "var/lib/cloud/instances/i-1", "var/lib/cloud/instances/i-1/sem"] {
            assert!(wanted.remove(dir).is_some(), "{dir}");
        }
        assert_eq!(maker.files(), wanted, "{options:?}");
        let stat = maker.debugfs("stat /var/log/syslog\nea_get /var/log/syslog user.note\n");
        assert!(
            stat.contains("User:   104") && stat.contains("Group:     4") && stat.contains("Mode:  0640"),
            "{stat}"
        );
        assert!(stat.contains("kept"), "{stat}");

        let again = remove(&maker.disk()).unwrap();
        assert_eq!((again.removed, again.left), (Vec::new(), Vec::new()));
        assert_eq!(find(&maker.disk()).unwrap(), []);
        assert_eq!(maker.files(), wanted);
    }
}

#[test]
fn what_was_deleted_before_and_what_the_journal_remembers_goes_too() {
    if !ready() {
        return;
    }
    let maker = Maker::new();
    maker.system("root");
    maker.secret("root/root/gone");
    let secret = format!("{SECRET}journal\n").repeat(256).into_bytes();
    maker.write("block", &secret[..4096]);
    for features in ["^metadata_csum", "metadata_csum"] {
        maker.build(&["root"], &["-t", "ext4", "-b", "4096", "-O", features]);
        // A transaction that is not in its place yet: a VM that was cut off leaves such.
        let said = maker.debugfs("bmap /usr/bin/tool 5\n");
        let target: u64 = said.split_whitespace().last().unwrap().parse().unwrap();
        let block = maker.dir.path().join("block");
        maker.debugfs(&format!("rm /root/gone\njo\njw -b {target} {}\njc\n", block.display()));
        assert!(maker.debugfs("stats\n").contains("needs_recovery"));
        let intact = fs::read(maker.disk()).unwrap();

        let report = remove(&maker.disk()).unwrap();
        assert_eq!(sorted(report.removed), expected());
        assert!(maker.is_clean());
        // The journal was replayed, and its own copy is gone: what is left is in the file that it was written to.
        let content = fs::read(maker.disk()).unwrap();
        let starts = |at: &usize| content[*at..].starts_with(SECRET.as_bytes());
        let places: Vec<usize> = (0..content.len()).step_by(4096).filter(starts).collect();
        assert_eq!(places, [(START + target * 4096) as usize], "{features}");

        // e2fsck would go on with what is at the start of the disk.
        let mut bytes = intact;
        bytes[1024 + 0x38..][..2].copy_from_slice(&0xef53_u16.to_le_bytes());
        fs::write(maker.disk(), &bytes).unwrap();
        let error = remove(&maker.disk()).unwrap_err().to_string();
        assert!(error.contains("journal to replay"), "{error}");
        assert!(fs::read(maker.disk()).unwrap() == bytes);
    }
}

#[test]
fn names_that_say_something_to_debugfs_are_left() {
    if !ready() {
        return;
    }
    let maker = Maker::new();
    let canary = maker.dir.path().join("canary");
    fs::write(&canary, "untouched").unwrap();
    maker.write("root/etc/os-release", "");
    maker.write("root/var/lib/x", "");
    let write = format!("a\ndump /etc/os-release {}", canary.display()).replace('/', "_");
    let names: [&[u8]; 10] = [
        b"a b",
        b"a\"b",
        b"a'b",
        b"a;b",
        b"!touch x",
        b"a\nrm _etc_os-release",
        b"<8>",
        b"\xff\xfe",
        b"a\\b",
        write.as_bytes(),
    ];
    for name in names {
        let path = maker.dir.path().join("root/var/log").join(std::ffi::OsStr::from_bytes(name));
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, "log\n").unwrap();
    }
    maker.write("root/var/log/journal/a b/system.journal", "log\n");
    maker.write("root/var/log/journal/0a/a b", "log\n");
    maker.write("root/var/log/journal/0a/system.journal", "log\n");
    maker.build(&["root"], &["-t", "ext4"]);
    let before = maker.files();
    let report = remove(&maker.disk()).unwrap();
    let removed: Vec<&str> = report.removed.iter().map(|trace| trace.path.as_str()).collect();
    assert_eq!(removed, ["/var/log/journal/0a/system.journal"]);
    assert_eq!(report.left.len(), names.len() + 2, "{:?}", report.left);
    assert!(report.left.iter().all(|left| !left.trace.path.contains(char::is_control) && !left.why.is_empty()));
    assert!(report.left.iter().any(|left| left.trace.path == r"/var/log/\xff\xfe"));
    let mut wanted = before;
    wanted.remove("var/log/journal/0a/system.journal");
    assert_eq!(maker.files(), wanted);
    assert_eq!(fs::read_to_string(canary).unwrap(), "untouched");
    assert!(maker.is_clean());
    assert_eq!(remove(&maker.disk()).unwrap().left, report.left);
}

#[test]
fn a_var_of_its_own_and_swap_are_cleared() {
    if !ready() {
        return;
    }
    let maker = Maker::new();
    maker.system("whole");
    let dir = maker.dir.path();
    fs::create_dir(dir.join("parts")).unwrap();
    fs::rename(dir.join("whole/var"), dir.join("parts/var")).unwrap();
    fs::create_dir_all(dir.join("parts/var/cache")).unwrap();
    fs::rename(dir.join("whole/home"), dir.join("parts/home")).unwrap();
    maker.write("parts/home/ada/.profile", "");
    fs::create_dir(dir.join("whole/var")).unwrap();
    fs::create_dir(dir.join("empty")).unwrap();
    maker.build(&["whole", "parts/var", "parts/home", "empty"], &["-t", "ext4"]);
    let disk = File::options().read(true).write(true).open(maker.disk()).unwrap();
    let swap = START + 3 * LEN;
    ext::clear(&disk, swap..swap + LEN).unwrap();
    // A system that hibernates in it.
    disk.write_all_at(b"S1SUSPEND\0", swap + 0xff6).unwrap();
    disk.write_all_at(SECRET.as_bytes(), swap + 5 * MIB).unwrap();
    disk.write_all_at(b"after", swap + LEN).unwrap();

    assert_eq!(sorted(find(&maker.disk()).unwrap()), expected());
    let report = remove(&maker.disk()).unwrap();
    assert_eq!(sorted(report.removed), expected());
    assert!(report.notes.iter().any(|note| note == "the swap space in partition 4 was cleared"), "{:?}", report.notes);
    assert!(!maker.has(SECRET) && maker.has("SWAPSPACE2") && !maker.has("S1SUSPEND") && maker.has("after"));
    assert!(maker.is_clean());
    assert_eq!(remove(&maker.disk()).unwrap().removed, []);
}

#[test]
fn what_cannot_be_changed_is_refused_with_what_to_do() {
    if !ready() {
        return;
    }
    let refused = |maker: &Maker| {
        let error = remove(&maker.disk()).unwrap_err().to_string();
        assert!(error.contains("--keep-identity"), "{error}");
        error
    };
    let maker = Maker::new();
    maker.system("root");
    maker.build(&["root"], &["-t", "ext4"]);
    let disk = File::options().read(true).write(true).open(maker.disk()).unwrap();
    ext::clear(&disk, START..START + 64 * 1024).unwrap();
    disk.write_all_at(b"XFSB", START).unwrap();
    let before = fs::read(maker.disk()).unwrap();
    let error = refused(&maker);
    assert!(fs::read(maker.disk()).unwrap() == before);
    assert!(error.contains("partition 1 holds an XFS file system"), "{error}");

    maker.build(&["root"], &["-t", "ext4", "-O", "inline_data"]);
    let error = refused(&maker);
    assert!(error.contains("cannot be read"), "{error}");

    maker.build(&["root"], &["-t", "ext4", "-O", "bigalloc", "-C", "16384"]);
    let error = refused(&maker);
    assert!(error.contains("bigalloc"), "{error}");

    maker.write("small/etc/os-release", "");
    // Another file system goes there, and it is not in this disk.
    fs::create_dir(maker.dir.path().join("small/var")).unwrap();
    maker.build(&["small"], &["-t", "ext4"]);
    let error = refused(&maker);
    assert!(error.contains("no /var"), "{error}");

    maker.write("data/file", "");
    maker.build(&["data"], &["-t", "ext4"]);
    let error = refused(&maker);
    assert!(error.contains("no Linux system"), "{error}");
}

#[test]
fn damage_is_an_error_and_never_a_panic() {
    if !ready() {
        return;
    }
    let maker = Maker::new();
    maker.system("root");
    maker.build(&["root"], &["-t", "ext4"]);
    let intact = fs::read(maker.disk()).unwrap();
    let mut refused = 0;
    for seed in 0..12 {
        let mut bytes = intact.clone();
        // Superblock, group descriptors, bitmaps, tables of inodes and the first directories are in here.
        for places in noise(seed, 64 * 4).chunks_exact(4) {
            let place = u32::from_le_bytes(places.try_into().unwrap()) as usize;
            bytes[START as usize + 2048 + place % (3 << 20)] ^= 1 << (place % 8);
        }
        fs::write(maker.disk(), bytes).unwrap();
        match remove(&maker.disk()) {
            Ok(_) => assert!(maker.is_clean() && find(&maker.disk()).unwrap().is_empty()),
            Err(e) => {
                refused += 1;
                assert!(!e.to_string().contains(char::is_control), "{e}");
            }
        }
    }
    assert!(refused > 0);
    // Cut off in the middle.
    fs::write(maker.disk(), &intact[..(START + LEN / 2) as usize]).unwrap();
    assert!(remove(&maker.disk()).is_err());
}
