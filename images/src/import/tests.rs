use std::fs::{self, File};
use std::io::{Seek, SeekFrom, Write};
use std::process::Command;

mod container;
mod streams;

use super::*;
use crate::fixtures::{files, noise, store};

fn go_on(_: u64, _: u64) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

fn import(store: &Store, path: &Path) -> Result<Imported, ImportError> {
    import_disk(store, path, Options::default(), &mut go_on)
}

/// Runs a tool; false, with a line that says so, when it is not installed.
fn tool(program: &str, arguments: &[&str]) -> bool {
    match Command::new(program).args(arguments).output() {
        Ok(output) => {
            assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
            true
        }
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            println!("skipped: {program} is not installed");
            false
        }
        Err(e) => panic!("{program}: {e}"),
    }
}

/// Two MiB with a hole in the middle.
fn raw_disk(dir: &Path) -> PathBuf {
    let path = dir.join("disk.raw");
    let mut file = File::create(&path).unwrap();
    file.set_len(2 << 20).unwrap();
    file.write_all(&noise(1, 300_000)).unwrap();
    file.seek(SeekFrom::Start(1_500_000)).unwrap();
    file.write_all(&noise(2, 100_000)).unwrap();
    path
}

/// Something that counts as a kernel.
fn kernel(seed: u32) -> Vec<u8> {
    let mut bytes = noise(seed, 70_000);
    bytes[0x202..0x206].copy_from_slice(b"HdrS");
    bytes
}

/// An ext4 file system with these files; `None`, with a line that says so, without mke2fs.
fn ext4(dir: &Path, name: &str, content: &[(&str, &[u8])], links: &[(&str, &str)]) -> Option<PathBuf> {
    let tree = dir.join(format!("{name}.d"));
    for (path, bytes) in content {
        let path = tree.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }
    for (target, link) in links {
        std::os::unix::fs::symlink(target, tree.join(link)).unwrap();
    }
    let image = dir.join(name);
    let (tree, text) = (tree.to_str().unwrap(), image.to_str().unwrap());
    tool("mke2fs", &["-q", "-t", "ext4", "-U", UUID, "-d", tree, text, "8M"]).then_some(image)
}

const UUID: &str = "5c3a0d6e-0000-4000-8000-00000000000a";

/// A GPT disk with one partition that holds the file `content`.
fn gpt_disk(path: &Path, content: &Path) -> String {
    let bytes = fs::read(content).unwrap();
    let mut file = File::options().read(true).write(true).create_new(true).open(path).unwrap();
    file.set_len(bytes.len() as u64 + (4 << 20)).unwrap();
    let sectors = u32::try_from(fs::metadata(path).unwrap().len() / 512 - 1).unwrap();
    gpt::mbr::ProtectiveMBR::with_lb_size(sectors).overwrite_lba0(&mut file).unwrap();
    let mut disk = gpt::GptConfig::new().writable(true).create_from_device(&mut file, None).unwrap();
    disk.add_partition("root", bytes.len() as u64, gpt::partition_types::LINUX_FS, 0, None).unwrap();
    let partition = disk.partitions()[&1].clone();
    disk.write().unwrap();
    file.seek(SeekFrom::Start(partition.first_lba * 512)).unwrap();
    file.write_all(&bytes).unwrap();
    partition.part_guid.to_string()
}

fn part_bytes(store: &Store, imported: &Imported, part: &str) -> Vec<u8> {
    let out = store.dir().join("out");
    store.materialise(&imported.digest, part, &out).unwrap();
    fs::read(out).unwrap()
}

#[test]
fn a_raw_disk_comes_back_as_it_was() {
    let (dir, store) = store();
    let path = raw_disk(dir.path());
    let options = Options { tag: Some("disk"), ..Options::default() };
    let mut last = (0, 0);
    let imported = import_disk(&store, &path, options, &mut |done, total| {
        assert!(done >= last.0 && done <= total);
        last = (done, total);
        ControlFlow::Continue(())
    })
    .unwrap();
    assert_eq!(last, (2 << 20, 2 << 20));
    assert_eq!(store.resolve("disk").unwrap(), imported.digest);
    assert!(part_bytes(&store, &imported, DISK) == fs::read(&path).unwrap());
    assert_eq!(imported.manifest.labels["source"], "disk.raw");
    assert_eq!(imported.manifest.boot, None);
    assert!(imported.report.iter().any(|line| line.contains("no boot data")), "{:?}", imported.report);
    let chunk_files = files(&store.dir().join("chunks"));
    assert_eq!(chunk_files.len(), 5 + 3, "chunks of the hole are not kept");

    let written = |path: &PathBuf| fs::metadata(path).unwrap().modified().unwrap();
    let before: Vec<_> = chunk_files.iter().map(written).collect();
    assert_eq!(import(&store, &path).unwrap().digest, imported.digest, "the same file is the same image");
    assert_eq!(chunk_files.iter().map(written).collect::<Vec<_>>(), before, "nothing is written twice");
}

#[test]
fn a_stopped_import_leaves_nothing_in_the_way() {
    let (dir, store) = store();
    let path = raw_disk(dir.path());
    let options = Options { tag: Some("disk"), ..Options::default() };
    let mut calls = 0;
    let error = import_disk(&store, &path, options, &mut |_, _| {
        calls += 1;
        if calls == 3 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    assert!(matches!(error, Err(ImportError::Stopped { .. })));
    assert!(store.tags().unwrap().is_empty());
    import_disk(&store, &path, options, &mut go_on).unwrap();
    assert_eq!(store.tags().unwrap().len(), 1);
}

#[test]
fn what_is_no_disk_is_refused_with_what_to_do() {
    let (dir, store) = store();
    let refused = |name: &str, bytes: &[u8], message: &str| {
        let path = dir.path().join(name);
        fs::write(&path, bytes).unwrap();
        let error = import(&store, &path).unwrap_err().to_string();
        assert!(error.contains(message) && error.contains(name), "{error:?} should say {message:?}");
    };
    let padded = |front: &[u8]| [front, &[0; 4096 - 10]].concat();
    refused("empty", b"", "is empty");
    refused("odd", &[1; 513], "whole number of 512-byte sectors");
    refused("a.xz", &padded(b"\xfd7zXZ\0"), "compressed with xz and cannot be unpacked");
    refused("a.raw.gz", &padded(b"\x1f\x8b"), "compressed with gzip and cannot be unpacked");
    refused("a.img", &padded(b"\x28\xb5\x2f\xfd"), "compressed with zstd and cannot be unpacked");
    refused("a.bz2", &padded(b"BZh"), "bzip2 -dk");
    refused("a.vmdk", &padded(b"KDMV"), "qemu-img convert -O raw");
    refused("page.qcow2", &padded(b"<!DOCTYPE html>"), "a web page");
    refused("vmlinuz", &kernel(1), "a Linux kernel");
    let footer = [&[0; 4096][..], b"conectix", &[0; 504]].concat();
    refused("fixed", &footer, "VHD");
    refused("cut.qcow2", b"QFI\xfb\0\0\0\x03", "cut off");
    assert!(matches!(import(&store, dir.path()), Err(ImportError::NotAFile { found: "a directory", .. })));
    assert!(matches!(import(&store, &dir.path().join("none")), Err(ImportError::Io { .. })));
    let error = import_disk(&store, dir.path(), Options { tag: Some("../x"), ..Options::default() }, &mut go_on);
    assert!(error.unwrap_err().to_string().contains("image name"));
}

#[test]
fn a_bare_file_system_boots_by_its_links() {
    let (dir, store) = store();
    let (new, old, initrd) = (kernel(1), kernel(2), noise(3, 9000));
    let content: &[(&str, &[u8])] = &[
        ("boot/vmlinuz-6.1.0-18", &new),
        ("boot/vmlinuz-6.1.0-9", &old),
        ("boot/initrd.img-6.1.0-18", &initrd),
        ("etc/os-release", b"NAME=x\nPRETTY_NAME=\"Debian GNU/Linux 12\"\n"),
    ];
    let links = [("boot/vmlinuz-6.1.0-18", "vmlinuz"), ("/boot/initrd.img-6.1.0-18", "initrd.img")];
    let Some(image) = ext4(dir.path(), "root.ext4", content, &links) else { return };
    let imported = import(&store, &image).unwrap();
    let boot = imported.manifest.boot.clone().unwrap();
    assert_eq!(boot.cmdline, format!("root=UUID={UUID} rw"));
    assert!(part_bytes(&store, &imported, KERNEL) == new);
    assert!(part_bytes(&store, &imported, INITRD) == initrd);
    assert_eq!(imported.manifest.labels["os"], "Debian GNU/Linux 12");

    // Without the links, the newest kernel; without an initial RAM disk, a root that the kernel alone can find.
    let Some(image) = ext4(dir.path(), "bare.ext4", &content[..2], &[]) else { return };
    let imported = import(&store, &image).unwrap();
    assert!(part_bytes(&store, &imported, KERNEL) == new);
    assert_eq!(imported.manifest.boot.unwrap().cmdline, "root=/dev/vda rw");
}

#[test]
fn a_partitioned_disk_boots_by_its_grub_configuration() {
    let (dir, store) = store();
    let config =
        b"set default=0\nmenuentry 'Debian' {\n linux /boot/vmlinuz-6.1 root=PARTUUID=ab ro console=ttyS0 $x\n \
                   initrd /boot/initrd.img-6.1\n}\n";
    let content: &[(&str, &[u8])] = &[
        ("boot/grub/grub.cfg", config),
        ("boot/vmlinuz-6.1", &kernel(1)),
        ("boot/vmlinuz-9.9", &kernel(2)),
        ("boot/initrd.img-6.1", &noise(3, 9000)),
        ("etc/fstab", b"PARTUUID=ab / ext4 rw 0 1\n"),
    ];
    let Some(image) = ext4(dir.path(), "fs", content, &[]) else { return };
    let disk = dir.path().join("disk.raw");
    let partuuid = gpt_disk(&disk, &image);
    let imported = import(&store, &disk).unwrap();
    assert_eq!(imported.manifest.boot.clone().unwrap().cmdline, "root=PARTUUID=ab ro console=ttyS0");
    assert!(part_bytes(&store, &imported, KERNEL) == kernel(1));
    assert!(imported.report[0].contains("GPT with 1 partitions"), "{:?}", imported.report);

    // The same without a configuration: the partition's own UUID.
    fs::remove_dir_all(dir.path().join("fs.d")).unwrap();
    let Some(image) = ext4(dir.path(), "fs", &content[1..], &[]) else { return };
    let disk = dir.path().join("other.raw");
    let other = gpt_disk(&disk, &image);
    assert_ne!(other, partuuid);
    let boot = import(&store, &disk).unwrap().manifest.boot.unwrap();
    assert_eq!(boot.cmdline, format!("root=PARTUUID={other} ro"));

    // Cut off in the middle of the partition.
    let file = File::options().write(true).open(&disk).unwrap();
    file.set_len(4 << 20).unwrap();
    let error = import(&store, &disk).unwrap_err();
    assert!(matches!(error, ImportError::Truncated { .. }) && error.to_string().contains("partition 1"), "{error}");
    fs::write(&image, &fs::read(&image).unwrap()[..4 << 20]).unwrap();
    let error = import(&store, &image).unwrap_err();
    assert!(error.to_string().contains("ext4 file system ends at"), "{error}");
}

#[test]
fn a_boot_partition_of_its_own_behind_an_mbr() {
    let (dir, store) = store();
    let entry = b"title Linux\nlinux /vmlinuz-6.5\ninitrd /initramfs-6.5.img\noptions ro quiet $kernelopts\n";
    let boot: &[(&str, &[u8])] = &[
        ("grub2/grub.cfg", b"blscfg\n"),
        ("loader/entries/a-6.5.conf", entry),
        ("vmlinuz-6.5", &kernel(1)),
        ("initramfs-6.5.img", &noise(2, 100)),
    ];
    let Some(boot) = ext4(dir.path(), "boot", boot, &[]) else { return };
    let Some(root) = ext4(dir.path(), "root", &[("etc/os-release", b"")], &[]) else { return };
    let mut disk = vec![0; 1 << 20];
    disk[440..444].copy_from_slice(&[0xef, 0xbe, 0xad, 0xde]);
    for (slot, start) in [(0, 2048_u32), (1, 2048 + 16384)] {
        let at = 446 + slot * 16;
        disk[at + 4] = 0x83;
        disk[at + 8..at + 12].copy_from_slice(&start.to_le_bytes());
        disk[at + 12..at + 16].copy_from_slice(&16384_u32.to_le_bytes());
    }
    disk[510..512].copy_from_slice(&[0x55, 0xaa]);
    disk.extend(fs::read(boot).unwrap());
    disk.extend(fs::read(root).unwrap());
    let path = dir.path().join("disk");
    fs::write(&path, disk).unwrap();
    let imported = import(&store, &path).unwrap();
    assert_eq!(imported.manifest.boot.unwrap().cmdline, "root=PARTUUID=deadbeef-02 ro quiet");
}

#[test]
fn links_that_loop_and_files_that_lie_are_no_boot_data() {
    let (dir, store) = store();
    let content: &[(&str, &[u8])] = &[
        ("boot/grub/grub.cfg", b"menuentry x {\nlinux /gone\n}\nmenuentry y {\nlinux /boot/text\n}\n"),
        ("boot/text", b"not a kernel"),
    ];
    let links = [("b", "a"), ("a", "b"), ("a", "vmlinuz"), ("../../../../etc/shadow", "initrd.img")];
    let Some(image) = ext4(dir.path(), "fs", content, &links) else { return };
    let imported = import(&store, &image).unwrap();
    assert_eq!(imported.manifest.boot, None);
    let report = imported.report.join("\n");
    for line in ["/gone is not there", "/boot/text is not an x86 Linux kernel", "no boot data: no kernel was found"] {
        assert!(report.contains(line), "{report}");
    }
}

#[test]
fn damaged_file_systems_never_panic_nor_hang() {
    let (dir, store) = store();
    let content: &[(&str, &[u8])] =
        &[("boot/vmlinuz-6.1", &kernel(1)), ("boot/grub/grub.cfg", b"menuentry x {\nlinux /boot/vmlinuz-6.1\n}\n")];
    let Some(image) = ext4(dir.path(), "fs", content, &[("boot/vmlinuz-6.1", "vmlinuz")]) else { return };
    let whole = fs::read(&image).unwrap();
    let random = noise(9, 4 * 300);
    for (round, r) in random.chunks(4).enumerate() {
        let mut bytes = whole.clone();
        let r = u32::from_le_bytes(r.try_into().unwrap()) as usize;
        // Superblock, group descriptors and the first inodes; several bytes at once.
        for step in 0..1 + round % 4 {
            bytes[1024 + (r >> step) % 60_000] = (r >> (8 + step)) as u8;
        }
        if round % 3 == 0 {
            bytes[1024 + r % 0x160] = (r >> 16) as u8;
        }
        fs::write(&image, &bytes).unwrap();
        match import(&store, &image) {
            Ok(_) | Err(ImportError::Truncated { .. }) => {}
            Err(e) => panic!("round {round}: {e}"),
        }
    }
}

#[test]
fn a_hypervisor_image_from_files() {
    let (dir, store) = store();
    let [kernel_path, initrd_path] = ["vmlinuz", "initrd"].map(|name| dir.path().join(name));
    fs::write(&kernel_path, kernel(1)).unwrap();
    fs::write(&initrd_path, noise(2, 200_000)).unwrap();
    let imported = import_files(&store, &kernel_path, &initrd_path, "console=ttyS0", Some("vmm")).unwrap();
    assert_eq!(imported.manifest.kind, ImageKind::Vmm);
    assert_eq!(imported.manifest.boot.clone().unwrap().cmdline, "console=ttyS0");
    assert!(part_bytes(&store, &imported, INITRD) == noise(2, 200_000));
    assert!(store.summary("vmm").unwrap().direct_boot);
    let wrong = import_files(&store, &initrd_path, &kernel_path, "", None);
    assert!(matches!(wrong, Err(ImportError::NotAKernel { .. })));
    assert!(matches!(
        import_files(&store, &kernel_path, &initrd_path, "a\nb", None),
        Err(ImportError::Manifest { .. })
    ));
}

// ---- qcow2, made by the tool that everybody uses ----------------------------------------------------------------------

#[test]
fn what_is_no_file_is_refused_before_it_is_waited_for() {
    let (dir, store) = store();
    let pipe = dir.path().join("pipe");
    assert!(tool("mkfifo", &[pipe.to_str().unwrap()]));
    let _socket = std::os::unix::net::UnixListener::bind(dir.path().join("socket")).unwrap();
    let wrong = |error: ImportError, name: &str, found: &str, wanted: &str| {
        assert!(matches!(error, ImportError::NotAFile { .. }), "{error}");
        let text = error.to_string();
        assert!([name, found, wanted].iter().all(|part| text.contains(part)), "{text}");
    };
    wrong(import(&store, &pipe).unwrap_err(), "pipe", "a named pipe", "raw or qcow2");
    wrong(import(&store, &dir.path().join("socket")).unwrap_err(), "socket", "a socket", "raw or qcow2");
    let kernel_path = dir.path().join("vmlinuz");
    fs::write(&kernel_path, kernel(1)).unwrap();
    let zero = Path::new("/dev/zero");
    let files = |kernel: &Path, initrd: &Path| import_files(&store, kernel, initrd, "", None).unwrap_err();
    wrong(files(&pipe, &kernel_path), "pipe", "a named pipe", "a kernel");
    wrong(files(zero, &kernel_path), "/dev/zero", "a character device", "a kernel");
    wrong(files(&kernel_path, zero), "/dev/zero", "a character device", "an initial RAM disk");

    for (name, format) in [("top-raw", "raw"), ("top-qcow2", "qcow2")] {
        let top = dir.path().join(name);
        let out = top.to_str().unwrap();
        if !tool("qemu-img", &["create", "-q", "-f", "qcow2", "-u", "-b", "pipe", "-F", format, out, "2M"]) {
            return;
        }
        wrong(import(&store, &top).unwrap_err(), "pipe", "a named pipe", "raw or qcow2");
    }
    let data = dir.path().join("data.bin");
    let raw = raw_disk(dir.path());
    let top = qcow2(&raw, "top", &["-o", &format!("data_file={}", data.display())]).unwrap();
    fs::remove_file(&data).unwrap();
    assert!(tool("mkfifo", &[data.to_str().unwrap()]));
    wrong(import(&store, &top).unwrap_err(), "data.bin", "a named pipe", "raw or qcow2");
}

/// Converts the raw disk with these options; `None` without qemu-img.
fn qcow2(raw: &Path, name: &str, options: &[&str]) -> Option<PathBuf> {
    let out = raw.with_file_name(name);
    let mut arguments = vec!["convert", "-f", "raw", "-O", "qcow2"];
    arguments.extend(options);
    arguments.extend([raw.to_str().unwrap(), out.to_str().unwrap()]);
    tool("qemu-img", &arguments).then_some(out)
}

#[test]
fn qcow2_of_every_readable_kind_is_the_raw_disk() {
    let (dir, store) = store();
    let raw = raw_disk(dir.path());
    let index = |imported: &Imported| imported.manifest.parts[DISK].index;
    let wanted = index(&import(&store, &raw).unwrap());
    let kinds: &[&[&str]] = &[
        &[],
        &["-c"],
        &["-o", "compat=0.10"],
        &["-o", "cluster_size=512"],
        &["-o", "cluster_size=2M"],
        &["-o", "preallocation=full"],
        &["-S", "0"],
        &["-o", "lazy_refcounts=on"],
    ];
    for (number, options) in kinds.iter().enumerate() {
        let Some(path) = qcow2(&raw, &format!("{number}.img"), options) else { return };
        let imported = import(&store, &path).unwrap_or_else(|e| panic!("{options:?}: {e}"));
        assert_eq!(index(&imported), wanted, "{options:?}");
        assert_eq!(imported.manifest.labels["format"], "qcow2");
    }
    let external = format!("data_file={},data_file_raw=on", dir.path().join("data.bin").display());
    let Some(path) = qcow2(&raw, "external", &["-o", &external]) else { return };
    // qemu-img writes the absolute path down; the file is in the image's own folder all the same.
    assert_eq!(index(&import(&store, &path).unwrap()), wanted);
}

#[test]
fn backing_chains_within_the_folder_only() {
    let (dir, store) = store();
    let raw = raw_disk(dir.path());
    let Some(base) = qcow2(&raw, "base", &[]) else { return };
    let top = |name: &str, backing: &str| {
        let path = dir.path().join(name);
        let out = path.to_str().unwrap();
        assert!(tool("qemu-img", &["create", "-q", "-f", "qcow2", "-u", "-b", backing, "-F", "qcow2", out, "2M"]));
        path
    };
    let (middle, _) = (top("middle", "base"), base);
    let path = top("top", "middle");
    assert!(part_bytes(&store, &import(&store, &path).unwrap(), DISK) == fs::read(&raw).unwrap());

    let error = import(&store, &top("loop", "loop")).unwrap_err();
    assert!(matches!(error, ImportError::Chain { .. }), "{error}");
    let error = import(&store, &top("gone", "nothing")).unwrap_err();
    assert!(error.to_string().contains("cannot open"), "{error}");
    let elsewhere = tempfile::tempdir().unwrap();
    let outside = elsewhere.path().join("secret");
    fs::copy(&middle, &outside).unwrap();
    std::os::unix::fs::symlink(&outside, dir.path().join("link")).unwrap();
    for name in [outside.to_str().unwrap(), "../secret", "link", "/etc/nothing-there", "nbd://host/disk"] {
        let error = import(&store, &top("bad", name)).unwrap_err();
        assert!(matches!(error, ImportError::Outside { .. }), "{name}: {error}");
    }
    fs::copy(&raw, elsewhere.path().join("base.raw")).unwrap();
    let allowed = [elsewhere.path().join("base.raw")];
    let path = dir.path().join("allowed");
    let backing = allowed[0].to_str().unwrap();
    tool("qemu-img", &["create", "-q", "-f", "qcow2", "-b", backing, "-F", "raw", path.to_str().unwrap()]);
    assert!(matches!(import(&store, &path), Err(ImportError::Outside { .. })));
    let options = Options { allow: &allowed, ..Options::default() };
    assert!(import_disk(&store, &path, options, &mut go_on).is_ok());
}

#[test]
fn qcow2_features_that_are_not_read_are_refused_by_name() {
    let (dir, store) = store();
    let raw = raw_disk(dir.path());
    let secret =
        ["--object", "secret,id=s,data=x", "-o", "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"];
    let kinds: &[(&[&str], &str)] = &[
        (&["-c", "-o", "compression_type=zstd"], "zstd; "),
        (&["-o", "extended_l2=on"], "extended L2"),
        (&secret, "encrypted"),
    ];
    for (number, (options, message)) in kinds.iter().enumerate() {
        let Some(path) = qcow2(&raw, &format!("{number}.img"), options) else { return };
        let error = import(&store, &path).unwrap_err().to_string();
        assert!(error.contains(message.trim_end_matches("; ")), "{error}");
        assert!(error.contains("qemu-img convert -O raw"), "{error}");
    }
    let Some(path) = qcow2(&raw, "corrupt", &[]) else { return };
    let mut bytes = fs::read(&path).unwrap();
    bytes[79] |= 2;
    fs::write(&path, bytes).unwrap();
    assert!(import(&store, &path).unwrap_err().to_string().contains("qemu-img check -r all"));
}

#[test]
fn a_cut_or_damaged_qcow2_is_never_another_disk_by_accident() {
    let (dir, store) = store();
    let raw = raw_disk(dir.path());
    for options in [&[][..], &["-c"]] {
        let Some(path) = qcow2(&raw, "whole", options) else { return };
        let whole = fs::read(&path).unwrap();
        let wanted = import(&store, &path).unwrap().manifest.parts[DISK].index;
        let cut = dir.path().join("cut");
        for len in (0..whole.len()).step_by(16_000).chain([whole.len() - 1, whole.len() - 512, whole.len() - 1000]) {
            fs::write(&cut, &whole[..len]).unwrap();
            if let Ok(imported) = import(&store, &cut) {
                // The last sector of compressed data is padding.
                assert_eq!(imported.manifest.parts[DISK].index, wanted, "cut to {len} of {}", whole.len());
            }
        }
        // Flips in the header and the tables: anything but a panic.
        for r in noise(4, 4 * 200).chunks(4) {
            let r = u32::from_le_bytes(r.try_into().unwrap()) as usize;
            let mut bytes = whole.clone();
            let at = if r.is_multiple_of(2) { r / 2 % 200 } else { r / 2 % bytes.len() };
            bytes[at] ^= 1 << (r >> 24 & 7);
            fs::write(&cut, &bytes).unwrap();
            let _ = import(&store, &cut);
        }
    }
}

#[test]
fn a_hostile_header_claims_the_moon() {
    let (dir, store) = store();
    let path = dir.path().join("moon");
    if !tool("qemu-img", &["create", "-q", "-f", "qcow2", path.to_str().unwrap(), "60T"]) {
        return;
    }
    let error = import(&store, &path).unwrap_err();
    assert!(matches!(error, ImportError::TooLarge { .. }), "{error}");
    let text = error.to_string();
    assert!(text.contains("4398046511104 bytes (4 TiB)") && text.contains("shrink it"), "{text}");
    let huge = dir.path().join("huge");
    File::create(&huge).unwrap().set_len(64 << 30).unwrap();
    let imported = import(&store, &huge).unwrap();
    assert_eq!(imported.manifest.parts[DISK].content, 0, "a hole of 64 GiB costs an index and nothing else");
}

proptest::proptest! {
    #[test]
    fn random_qcow2_headers_never_panic(mut bytes in proptest::collection::vec(0_u8.., 0..400), real: bool) {
        if real && bytes.len() >= 104 {
            bytes[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
            bytes[20..24].copy_from_slice(&16_u32.to_be_bytes());
            bytes[32..36].fill(0);
            bytes[72..80].fill(0);
            bytes[100..104].copy_from_slice(&104_u32.to_be_bytes());
        }
        let _ = qcow2::Header::parse(&bytes);
        let _ = detect(&bytes, &bytes);
    }
}

#[test]
fn reading_to_the_end_of_a_file_that_shrinks_is_an_error() {
    let (dir, _) = store();
    let path = raw_disk(dir.path());
    let file = File::options().read(true).write(true).open(&path).unwrap();
    let mut source = RawSource::new(file.try_clone().unwrap(), &path).unwrap();
    file.set_len(4096).unwrap();
    let mut bytes = [0; 8192];
    assert!(matches!(source.read_at(&mut bytes, 0), Err(ImportError::Truncated { .. })));
}
