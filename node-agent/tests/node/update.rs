//! A tag one update of a package apart: what a node that has the version before gets, byte by byte. Nothing runs, so that this
//! takes neither root nor KVM.

use std::fmt::Write;
use std::fs::{self, File};
use std::ops::ControlFlow;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::Ordering;

use bedplate_api::Digest;
use bedplate_api::client::Client;
use bedplate_api::image::BootData;
use bedplate_images::import::{Options, import_disk};
use bedplate_images::{CHUNK_SIZE, Store};
use bedplate_node::image::{CopyLimits, Images};
use tokio::sync::watch;

use crate::copy::{Control, repository};

/// Content of a file: `len` bytes, words in files with an odd `seed` and noise in others, as text and programs are.
fn content(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        state >> 33
    };
    let mut bytes = Vec::with_capacity(len + 16);
    while bytes.len() < len {
        match seed % 2 {
            0 => bytes.extend_from_slice(&(next() as u32).to_le_bytes()),
            _ => bytes.extend_from_slice(format!("{:x} ", next() % 5000).as_bytes()),
        }
    }
    bytes.truncate(len);
    bytes
}

fn run(command: &mut Command) -> String {
    let out = command.output().unwrap();
    assert!(out.status.success(), "{command:?}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).unwrap()
}

/// Whether the tools that make and change file systems are there.
fn tools() -> bool {
    let there = |tool: &str| Command::new(tool).arg("-V").output().is_ok();
    let all = there("mke2fs") && there("debugfs") && there("e2fsck");
    if !all {
        eprintln!("skipped: needs mke2fs, debugfs and e2fsck (package e2fsprogs)");
    }
    all
}

/// A disk with 40 packages of 12 files each, of 1 to 80 KB and one of 600 KB, and the files of one of them.
fn made(dir: &Path) -> (PathBuf, Vec<String>) {
    let root = dir.join("root");
    for package in 0..40_u64 {
        let of_package = root.join(format!("usr/lib/package-{package}"));
        fs::create_dir_all(&of_package).unwrap();
        for file in 0..12 {
            let seed = package * 100 + file;
            let len = if file == 0 { 600_000 } else { 1000 + seed as usize * 7919 % 79_000 };
            fs::write(of_package.join(format!("file-{file}")), content(seed, len)).unwrap();
        }
    }
    fs::create_dir_all(root.join("var/lib/dpkg")).unwrap();
    fs::write(root.join("var/lib/dpkg/status"), content(1, 100_000)).unwrap();
    let disk = dir.join("disk.raw");
    run(Command::new("mke2fs").args(["-q", "-t", "ext4", "-d"]).arg(&root).arg(&disk).arg("256M"));
    (disk, (0..12).map(|file| format!("/usr/lib/package-17/file-{file}")).collect())
}

/// A copy of the Debian disk of the sample image `web`, where the lab's tests have made one, and the files of a package.
fn debian(dir: &Path, package: &str) -> Option<(PathBuf, Vec<String>)> {
    let original = std::env::var_os("BEDPLATE_TEST_WEB_DISK")?;
    let disk = dir.join("disk.raw");
    run(Command::new("cp").arg("--sparse=always").arg(original).arg(&disk));
    let list = format!("cat /var/lib/dpkg/info/{package}.list");
    let list = run(Command::new("debugfs").args(["-R", &list]).arg(&disk));
    let asks: String = list.lines().map(|path| format!("stat \"{path}\"\n")).collect();
    let said = debugfs(&disk, &[], &asks);
    let answers = said.split("debugfs: stat ").skip(1);
    let files = answers.filter(|answer| answer.contains("Type: regular"));
    let path = |answer: &str| answer.split('"').nth(1).unwrap().to_owned();
    Some((disk, files.map(path).collect()))
}

/// Has debugfs do `commands` to `disk`.
fn debugfs(disk: &Path, options: &[&str], commands: &str) -> String {
    let script = disk.with_file_name("commands");
    fs::write(&script, commands).unwrap();
    run(Command::new("debugfs").args(options).arg("-f").arg(&script).arg(disk))
}

/// Replaces `files` within `disk` as a package manager does: the new ones are written beside the old ones and take their
/// names one by one; then the list of what is installed is written anew. Bytes that were written to files.
fn update(disk: &Path, files: &[String]) -> u64 {
    let files = || files.iter().map(String::as_str).chain(["/var/lib/dpkg/status"]).enumerate();
    let last = files().count() - 1;
    let (old, new) = (disk.with_file_name("old"), disk.with_file_name("new"));
    for dir in [&old, &new] {
        fs::create_dir(dir).unwrap();
    }
    let dump = |to: &Path| {
        let dumps = files().map(|(number, path)| format!("dump \"{path}\" {}/{number}\n", to.display()));
        debugfs(disk, &[], &dumps.collect::<String>());
    };
    dump(&old);
    let (mut writes, mut renames, mut written) = (String::new(), String::new(), 0);
    for (number, path) in files() {
        let mut bytes = fs::read(old.join(number.to_string())).unwrap();
        if number == last {
            // One entry changes.
            let middle = bytes.len() / 2;
            bytes[middle..middle + 20].fill(b'9');
        } else {
            // Another program of about the same length; what it shares with the old one does not lie where it lay.
            bytes = content(number as u64 + bytes.len() as u64, bytes.len() + 100);
        }
        let file = new.join(number.to_string());
        fs::write(&file, &bytes).unwrap();
        written += bytes.len() as u64;
        // It writes into the working directory only; the dot is for a link in its place.
        let (parent, name) = path.rsplit_once('/').unwrap();
        writeln!(writes, "cd \"{parent}/.\"\nwrite {} \"{name}.dpkg-new\"", file.display()).unwrap();
        let draft = format!("\"{name}.dpkg-new\"");
        writeln!(renames, "cd \"{parent}/.\"\nrm \"{name}\"\nln {draft} \"{name}\"\nunlink {draft}").unwrap();
    }
    debugfs(disk, &["-w"], &(writes + &renames));
    run(Command::new("e2fsck").args(["-f", "-n"]).arg(disk));
    // The exit code of debugfs says nothing.
    dump(&old);
    for (number, path) in files() {
        let [is, should] = [&old, &new].map(|dir| fs::read(dir.join(number.to_string())).unwrap());
        assert!(is == should, "{path} was not replaced");
    }
    written
}

/// Bytes of the pieces of `size` bytes in which the two files differ.
fn changed(before: &Path, after: &Path, size: usize) -> u64 {
    let (before, after) = (File::open(before).unwrap(), File::open(after).unwrap());
    let len = before.metadata().unwrap().len();
    let (mut one, mut other) = (vec![0; size], vec![0; size]);
    let differ = |at: &u64| {
        before.read_exact_at(&mut one, *at).unwrap();
        after.read_exact_at(&mut other, *at).unwrap();
        one != other
    };
    (0..len).step_by(size).filter(differ).count() as u64 * size as u64
}

/// Imports `disk`. Where there is no kernel in it, it gets one beside it, since only what could start is copied to nodes.
fn import(store: &Store, disk: &Path) -> Digest {
    let put =
        |path: &Path| import_disk(store, path, Options::default(), &mut |_, _| ControlFlow::Continue(())).unwrap();
    let imported = put(disk);
    let mut manifest = imported.manifest;
    if manifest.boot.is_some() {
        return imported.digest;
    }
    let kernel = disk.with_file_name("kernel");
    fs::write(&kernel, vec![1; CHUNK_SIZE]).unwrap();
    manifest.parts.insert("kernel".to_owned(), put(&kernel).manifest.parts["disk"].clone());
    manifest.boot = Some(BootData { kernel: "kernel".to_owned(), initrd: None, cmdline: String::new() });
    store.put_manifest(&manifest).unwrap()
}

/// Copies `image` to the node; what the repository sent for it: bytes, and chunks among them.
async fn copy(node: &Images, control: &Control, image: Digest) -> (u64, u64) {
    let sent = || (control.sent.load(Ordering::SeqCst), control.sent_chunks.load(Ordering::SeqCst));
    let before = sent();
    let progress = watch::Sender::new(None);
    let (_, manifest) = node.begin(image, &progress).await.unwrap();
    node.finish(image, &manifest, &progress).await.unwrap();
    node.store().verify(&image).unwrap();
    let after = sent();
    (after.0 - before.0, after.1 - before.1)
}

/// A node with `disk` gets it again after an update of `files` in place.
async fn follow(what: &str, dir: &Path, disk: &Path, files: &[String]) {
    let (_repository, control) = repository();
    let source = Client::new(control.serve().await.parse().unwrap(), None).unwrap();
    let first = import(&control.store, disk);
    let before = dir.join("before.raw");
    run(Command::new("cp").arg("--sparse=always").args([disk, &before]));
    let written = update(disk, files);
    let second = import(&control.store, disk);

    let node = dir.join("node");
    let images = Images::new(Store::create(node.join("images")).unwrap(), &node, Some(source), CopyLimits::default());
    let (whole, _) = copy(&images, &control, first).await;
    let (got, chunks) = copy(&images, &control, second).await;
    let (blocks, rounded) = (changed(&before, disk, 4096), changed(&before, disk, CHUNK_SIZE));
    println!(
        "{what}: {} files with {} KiB were replaced, {} KiB changed on the disk, {} KiB rounded to chunks; the node got {} KiB for \
         that, {:.2} x, and {} KiB for the version before",
        files.len() + 1,
        written >> 10,
        blocks >> 10,
        rounded >> 10,
        got >> 10,
        got as f64 / rounded as f64,
        whole >> 10,
    );
    assert!(chunks > 0 && chunks * CHUNK_SIZE as u64 <= rounded, "{chunks} chunks");
    // Everything that came is counted: manifest, index, and chunks with their names.
    assert!(10 * got <= 13 * rounded, "{got} bytes");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_update_of_a_package_costs_a_node_what_changed_on_the_disk() {
    if !tools() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (disk, files) = made(dir.path());
    follow("one package of forty", dir.path(), &disk, &files).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn so_does_an_update_of_a_package_of_debian() {
    if !tools() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    // The library that nearly everything uses.
    match debian(dir.path(), "libc6:amd64") {
        Some((disk, files)) => follow("libc6 of Debian", dir.path(), &disk, &files).await,
        None => eprintln!("skipped: needs the image `web`; run it through `cargo xtask test`"),
    }
}
