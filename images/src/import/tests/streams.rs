//! Compressed files, pipes, VMDK, and what an import finds again.

use bedplate_api::image::Firmware;

use super::*;

/// What `program` makes of the file, on its standard output; `None` where it is not installed.
fn packed(program: &str, arguments: &[&str], path: &Path) -> Option<Vec<u8>> {
    match Command::new(program).args(arguments).arg(path).output() {
        Ok(output) => {
            assert!(output.status.success(), "{program}");
            Some(output.stdout)
        }
        Err(_) => {
            println!("skipped: {program} is not installed");
            None
        }
    }
}

const PACKERS: [(&str, &[&str]); 4] =
    [("gzip", &["-c"]), ("xz", &["-9c"]), ("xz", &["-cT0", "--block-size=100KiB"]), ("zstd", &["-cq"])];

fn stream(store: &Store, bytes: &[u8]) -> Result<Imported, ImportError> {
    import_stream(store, bytes, None, Path::new("standard input"), Options::default(), &mut go_on)
}

#[test]
fn packed_disks_are_the_disk_and_boot_as_it_does() {
    let (dir, store) = store();
    let content: &[(&str, &[u8])] = &[("boot/vmlinuz-6.1", &kernel(1)), ("etc/os-release", b"PRETTY_NAME=\"D\"\n")];
    let Some(raw) = ext4(dir.path(), "root", content, &[("boot/vmlinuz-6.1", "vmlinuz")]) else { return };
    let Some(qcow) = qcow2(&raw, "root.qcow2", &[]) else { return };
    let wanted = import(&store, &raw).unwrap().manifest;
    let piped = stream(&store, &fs::read(&raw).unwrap()).unwrap();
    assert_eq!((&piped.manifest.parts, &piped.manifest.boot), (&wanted.parts, &wanted.boot));
    assert_eq!(piped.reused, piped.chunks, "all of it was there");
    for (program, arguments) in PACKERS {
        for (inner, format) in [(&raw, "raw"), (&qcow, "qcow2")] {
            let Some(bytes) = packed(program, arguments, inner) else { continue };
            // By its content alone.
            let path = dir.path().join("disk.img");
            fs::write(&path, &bytes).unwrap();
            let mut last = (0, 0);
            let imported = import_disk(&store, &path, Options::default(), &mut |done, total| {
                last = (done, total);
                ControlFlow::Continue(())
            })
            .unwrap_or_else(|e| panic!("{program} {format}: {e}"));
            assert_eq!(last.0, last.1, "{program} {format}");
            let found = imported.manifest;
            assert_eq!((&found.parts, &found.boot), (&wanted.parts, &wanted.boot), "{program} {format}");
            assert_eq!((found.labels["os"].as_str(), found.labels["format"].as_str()), ("D", format));
            assert_eq!(stream(&store, &bytes).unwrap().manifest.parts, wanted.parts, "{program} {format}, piped");
        }
    }
    assert_eq!(fs::read_dir(store.dir().join("tmp")).unwrap().count(), 0, "nothing is left behind");
}

#[test]
fn a_stream_that_is_cut_or_damaged_is_no_image() {
    let (dir, store) = store();
    let raw = raw_disk(dir.path());
    for (program, arguments) in PACKERS {
        let Some(whole) = packed(program, arguments, &raw) else { continue };
        for len in [20, 1000, whole.len() / 2, whole.len() - 1] {
            let error = stream(&store, &whole[..len]).unwrap_err();
            assert!(matches!(error, ImportError::Packed { .. }), "{program} cut to {len}: {error}");
        }
        let mut flipped = whole.clone();
        flipped[whole.len() / 2] ^= 4;
        let error = stream(&store, &flipped).unwrap_err();
        assert!(error.to_string().contains("standard input is compressed with"), "{program}: {error}");
    }
    assert!(store.tags().unwrap().is_empty());
}

#[test]
fn streams_of_what_is_no_disk_are_refused_with_what_to_do() {
    let (dir, store) = store();
    let says = |bytes: &[u8], words: &[&str]| {
        let error = stream(&store, bytes).unwrap_err().to_string();
        assert!(words.iter().all(|word| error.contains(word)), "{error:?} should say {words:?}");
    };
    says(b"", &["empty"]);
    says(&[1; 700], &["standard input", "512-byte sectors"]);
    says(&[b"KDMV".as_slice(), &[0; 4096]].concat(), &["a sparse VMDK", "qemu-img convert"]);
    let raw = dir.path().join("x");
    fs::write(&raw, [&[1; 4096][..], b"conectix", &[0; 504]].concat()).unwrap();
    let Some(vhd) = packed("gzip", &["-c"], &raw) else { return };
    says(&vhd, &["unpacked, is a VHD disk image", "unpack it to a file"]);
    fs::write(&raw, &vhd).unwrap();
    says(&packed("gzip", &["-c"], &raw).unwrap(), &["unpacked, is compressed with gzip"]);
    let (top, disk) = (dir.path().join("top"), raw_disk(dir.path()));
    let [out, base] = [&top, &disk].map(|path| path.to_str().unwrap());
    if tool("qemu-img", &["create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", out]) {
        says(&packed("gzip", &["-c"], &top).unwrap(), &["refers to", base, "unpack it beside"]);
    }
}

#[test]
fn a_vmdk_with_flat_files_is_read_and_may_name_files_beside_it_only() {
    let (dir, store) = store();
    let raw = raw_disk(dir.path());
    let wanted = import(&store, &raw).unwrap().manifest.parts;
    let vmdk = dir.path().join("disk.vmdk");
    let convert = |subformat: &str| {
        let out = vmdk.to_str().unwrap();
        let subformat = format!("subformat={subformat}");
        tool("qemu-img", &["convert", "-f", "raw", "-O", "vmdk", "-o", &subformat, raw.to_str().unwrap(), out])
    };
    for subformat in ["monolithicFlat", "twoGbMaxExtentFlat"] {
        if !convert(subformat) {
            return;
        }
        let imported = import(&store, &vmdk).unwrap_or_else(|e| panic!("{subformat}: {e}"));
        assert_eq!(imported.manifest.parts, wanted, "{subformat}");
        assert_eq!(imported.manifest.labels["format"], "vmdk");
    }
    for subformat in ["monolithicSparse", "streamOptimized", "twoGbMaxExtentSparse"] {
        assert!(convert(subformat));
        let error = import(&store, &vmdk).unwrap_err().to_string();
        assert!(error.contains("disk.vmdk") && error.contains("qemu-img convert -O raw"), "{subformat}: {error}");
    }
    let text = |line: &str| format!("# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\n{line}\n");
    let refused = |line: &str| {
        fs::write(&vmdk, text(line)).unwrap();
        import(&store, &vmdk).unwrap_err()
    };
    for name in ["/etc/passwd", "../secret", "/dev/zero"] {
        let error = refused(&format!("RW 8 FLAT \"{name}\" 0"));
        assert!(matches!(error, ImportError::Outside { .. }), "{name}: {error}");
    }
    let cut = refused("RW 9999999 FLAT \"disk.raw\" 0");
    assert!(matches!(cut, ImportError::Truncated { .. }), "{cut}");
    let huge = refused("RW 99999999999999 ZERO");
    assert!(matches!(huge, ImportError::TooLarge { .. }), "{huge}");
    for line in
        ["RW 99999999999999999999 ZERO", "RW 8 FLAT \"disk.raw\" 18446744073709551615", "parentFileNameHint=\"x\""]
    {
        assert!(matches!(refused(line), ImportError::Vmdk { .. } | ImportError::Damaged { .. }), "{line}");
    }
}

#[test]
fn an_import_that_was_stopped_says_what_it_found_again() {
    let (dir, store) = store();
    let path = raw_disk(dir.path());
    let mut calls = 0;
    let stopped = import_disk(&store, &path, Options::default(), &mut |_, _| {
        calls += 1;
        if calls == 4 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    assert!(stopped.unwrap_err().to_string().contains("is used when you import it again"));
    let there = files(&store.dir().join("chunks")).len() as u64;
    assert!(there > 0);
    let imported = import(&store, &path).unwrap();
    assert_eq!((imported.chunks, imported.reused), (8, there));
    assert_eq!(import(&store, &path).unwrap().reused, 8);
}

#[test]
fn a_disk_without_a_kernel_is_marked_for_its_firmware() {
    let (dir, store) = store();
    let marked = |bytes: &[u8]| {
        let path = dir.path().join("disk");
        fs::write(&path, bytes).unwrap();
        let imported = import(&store, &path).unwrap();
        (imported.manifest.firmware, imported.report.join("\n"))
    };
    let mut disk = vec![0; 4 << 20];
    assert_eq!(marked(&disk).0, None);
    disk[510..512].copy_from_slice(&[0x55, 0xaa]);
    disk[446 + 4] = 0x83;
    disk[446 + 8] = 1;
    disk[446 + 12] = 1;
    assert!(marked(&disk).1.contains("no boot loader either"), "a table alone starts nothing");
    disk[0] = 0xeb;
    let (firmware, report) = marked(&disk);
    assert_eq!(firmware, Some(Firmware::Bios), "{report}");
    disk[446 + 4] = 0xef;
    assert_eq!(marked(&disk).0, Some(Firmware::Either));
    disk[0] = 0;
    assert_eq!(marked(&disk).0, Some(Firmware::Uefi));
    // A bare FAT file system starts nothing, though it has the mark and something in front of it.
    let mut fat = vec![0; 4 << 20];
    fat[0] = 0xeb;
    fat[54..57].copy_from_slice(b"FAT");
    fat[510..512].copy_from_slice(&[0x55, 0xaa]);
    assert_eq!(marked(&fat).0, None);
    let path = dir.path().join("gpt");
    fs::write(dir.path().join("esp"), vec![0; 1 << 20]).unwrap();
    gpt_disk(&path, &dir.path().join("esp"));
    assert_eq!(import(&store, &path).unwrap().manifest.firmware, None);
}
