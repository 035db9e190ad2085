//! The real command and a store of its own: what a person does with images, and what goes wrong then.

// Helpers of tests are tests: a panic there is the failure report.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

/// Runs the command with a store in `dir`, without anything of this machine's environment.
fn bedplate(dir: &Path, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_bedplate"))
        .args(args)
        .current_dir(dir)
        .env("BEDPLATE_STORE", dir.join("store"))
        .env_remove("BEDPLATE_CONTROL")
        .output()
        .unwrap()
}

fn ok(dir: &Path, args: &[&str]) -> String {
    let out = bedplate(dir, args);
    assert!(out.status.success(), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).unwrap()
}

/// One line that begins with the program's name, and exit code 1.
fn fails(dir: &Path, args: &[&str]) -> String {
    let out = bedplate(dir, args);
    let said = String::from_utf8(out.stderr).unwrap();
    assert_eq!(out.status.code(), Some(1), "{args:?}: {said}");
    let last = said.lines().last().unwrap_or_default().to_owned();
    assert!(last.starts_with("bedplate: "), "{said}");
    last
}

/// A disk of 3 MiB with some content, a hole, and content again.
fn disk(dir: &Path, name: &str) -> Vec<u8> {
    let mut bytes = vec![0; 3 << 20];
    bytes.iter_mut().take(200_000).enumerate().for_each(|(i, b)| *b = (i * 7 % 251) as u8);
    bytes[3 << 20 >> 1] = 1;
    fs::write(dir.join(name), &bytes).unwrap();
    bytes
}

#[test]
fn a_disk_goes_in_and_comes_out_as_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = disk(dir.path(), "disk.raw");
    assert_eq!(ok(dir.path(), &["image", "ls"]), "");
    let line = ok(dir.path(), &["image", "import", "disk.raw", "--name", "mine"]);
    assert!(line.contains("mine") && line.contains("3.0 MiB") && line.contains("no kernel found"), "{line}");
    let images: serde_json::Value = serde_json::from_str(&ok(dir.path(), &["image", "ls", "-o", "json"])).unwrap();
    assert_eq!((images[0]["name"].as_str(), images[0]["size"].as_u64()), (Some("mine"), Some(3 << 20)));
    ok(dir.path(), &["image", "export", "mine", "out.raw"]);
    assert!(fs::read(dir.path().join("out.raw")).unwrap() == bytes);
    let again = fails(dir.path(), &["image", "export", "mine", "out.raw"]);
    assert!(again.contains("out.raw is there already"), "{again}");
    assert!(ok(dir.path(), &["image", "inspect", "mine"]).contains("0 missing here"));
    ok(dir.path(), &["image", "verify"]);
}

#[test]
fn qcow2_is_known_by_its_content_and_gives_the_same_image() {
    let dir = tempfile::tempdir().unwrap();
    disk(dir.path(), "disk.raw");
    let convert = ["convert", "-f", "raw", "-O", "qcow2", "disk.raw", "misnamed.raw"];
    match Command::new("qemu-img").args(convert).current_dir(dir.path()).status() {
        Ok(status) => assert!(status.success()),
        Err(_) => return eprintln!("skipped: needs qemu-img (package qemu-utils)"),
    }
    ok(dir.path(), &["image", "import", "disk.raw", "--name", "raw"]);
    ok(dir.path(), &["image", "import", "misnamed.raw", "--name", "qcow"]);
    let part = |name: &str| {
        let text = ok(dir.path(), &["image", "inspect", name, "-o", "json"]);
        let image: serde_json::Value = serde_json::from_str(&text).unwrap();
        image["manifest"]["parts"]["disk"].clone()
    };
    assert_eq!(part("raw"), part("qcow"));
}

#[test]
fn a_packed_disk_comes_in_through_a_pipe_and_goes_out_as_qcow2() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let bytes = disk(dir, "disk.raw");
    let gzip = Command::new("gzip").args(["-k", "disk.raw"]).current_dir(dir).status().unwrap();
    assert!(gzip.success());
    let import = |args: &[&str], stdin: std::process::Stdio| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_bedplate"));
        let command = command.args(args).current_dir(dir).env("BEDPLATE_STORE", dir.join("store")).stdin(stdin);
        let out = command.output().unwrap();
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(out.status.success(), "{said}");
        said
    };
    let pipe = fs::File::open(dir.join("disk.raw.gz")).unwrap();
    let said = import(&["image", "import", "-", "--name", "piped"], pipe.into());
    assert!(said.contains("import standard input: 3.0 MiB"), "{said}");
    let said = import(&["image", "import", "disk.raw.gz", "--name", "file"], std::process::Stdio::null());
    assert!(said.contains("chunks were here already"), "{said}");
    ok(dir, &["image", "export", "piped", "out.qcow2"]);
    assert!(fs::read(dir.join("out.qcow2")).unwrap().starts_with(b"QFI"));
    ok(dir, &["image", "import", "out.qcow2", "--name", "back"]);
    ok(dir, &["image", "export", "back", "out.img"]);
    assert!(fs::read(dir.join("out.img")).unwrap() == bytes);
}

#[test]
fn a_disk_that_firmware_starts_is_marked() {
    let dir = tempfile::tempdir().unwrap();
    let mut bytes = vec![0; 1 << 20];
    bytes[..2].copy_from_slice(&[0xeb, 0x63]);
    bytes[510..512].copy_from_slice(&[0x55, 0xaa]);
    fs::write(dir.path().join("windows.raw"), bytes).unwrap();
    let line = ok(dir.path(), &["image", "import", "windows.raw", "--name", "w"]);
    assert!(line.contains("firmware (BIOS)"), "{line}");
    let text = ok(dir.path(), &["image", "inspect", "w"]);
    assert!(text.contains("firmware  bios") && text.contains("with SeaBIOS"), "{text}");
}

#[test]
fn a_suspended_guest_goes_in_and_its_files_come_out() {
    let dir = tempfile::tempdir().unwrap();
    let disk = disk(dir.path(), "disk.raw");
    let memory = fs::File::create(dir.path().join("memory")).unwrap();
    memory.set_len(8 << 20).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&memory, b"a word in memory", 5 << 20).unwrap();
    fs::write(dir.path().join("state"), "registers").unwrap();
    let files = ["--memory", "memory", "--state", "state", "--disk", "disk.raw", "--name", "asleep"];
    let line = ok(dir.path(), &[&["image", "import-suspended"], &files[..]].concat());
    assert!(line.contains("asleep") && line.contains("suspended") && line.contains("11.0 MiB"), "{line}");
    for (part, bytes) in
        [("memory", fs::read(dir.path().join("memory")).unwrap()), ("state", b"registers".to_vec()), ("disk", disk)]
    {
        ok(dir.path(), &["image", "export", "asleep", &format!("{part}.out"), "--part", part]);
        assert!(fs::read(dir.path().join(format!("{part}.out"))).unwrap() == bytes, "{part}");
    }
    ok(dir.path(), &["image", "verify", "asleep"]);
    let odd = ["image", "import-suspended", "--memory", "state", "--state", "state", "--name", "odd"];
    assert!(fails(dir.path(), &odd).contains("no multiple of 4096"));
}

#[test]
fn an_image_gets_one_more_name_and_who_had_that_is_told() {
    let dir = tempfile::tempdir().unwrap();
    disk(dir.path(), "disk.raw");
    fs::write(dir.path().join("other.raw"), [3; 4096]).unwrap();
    ok(dir.path(), &["image", "import", "disk.raw", "--name", "one"]);
    ok(dir.path(), &["image", "import", "other.raw", "--name", "other"]);
    let digest = |name: &str| {
        let text = ok(dir.path(), &["image", "inspect", name, "-o", "json"]);
        serde_json::from_str::<serde_json::Value>(&text).unwrap()["digest"].as_str().unwrap().to_owned()
    };
    let (one, other) = (digest("one"), digest("other"));
    assert!(ok(dir.path(), &["image", "tag", "one", "two"]).contains("two"));
    assert_eq!((digest("one"), digest("two")), (one.clone(), one.clone()));
    let moved = bedplate(dir.path(), &["image", "tag", &one, "other"]);
    assert!(moved.status.success());
    let said = String::from_utf8_lossy(&moved.stderr).into_owned();
    assert!(said.contains(&format!("other was {other} before")), "{said}");
    assert_eq!(digest("other"), one);
    // What lost its name is there until the next gc.
    ok(dir.path(), &["image", "tag", &other, "back"]);
    assert_eq!(digest("back"), other);
    for (name, new, why) in [("nobody", "x", "nobody"), ("one", "No/Name", "No/Name")] {
        let said = fails(dir.path(), &["image", "tag", name, new]);
        assert!(said.contains(why), "{said}");
    }
}

#[test]
fn a_name_goes_at_once_and_its_content_with_the_next_gc() {
    let dir = tempfile::tempdir().unwrap();
    disk(dir.path(), "disk.raw");
    ok(dir.path(), &["image", "import", "disk.raw", "--name", "mine"]);
    let swept = |args: &[&str]| {
        let text = ok(dir.path(), args);
        serde_json::from_str::<serde_json::Value>(&text).unwrap()["removed"].as_u64().unwrap()
    };
    assert_eq!(swept(&["image", "gc", "--grace", "0", "-o", "json"]), 0);
    ok(dir.path(), &["image", "rm", "mine"]);
    assert!(swept(&["image", "gc", "--grace", "0", "-o", "json"]) > 0);
    let gone = fails(dir.path(), &["image", "inspect", "mine"]);
    assert!(gone.contains("mine"), "{gone}");
}

#[test]
fn rot_is_found() {
    let dir = tempfile::tempdir().unwrap();
    disk(dir.path(), "disk.raw");
    ok(dir.path(), &["image", "import", "disk.raw", "--name", "mine"]);
    let chunk = walk(&dir.path().join("store/chunks")).next().unwrap();
    let mut bytes = fs::read(&chunk).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&chunk, bytes).unwrap();
    let said = fails(dir.path(), &["image", "verify", "mine"]);
    assert!(said.contains("chunk"), "{said}");
}

#[test]
fn one_damaged_image_does_not_hide_the_others() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    disk(dir, "disk.raw");
    ok(dir, &["image", "import", "disk.raw", "--name", "b-bad"]);
    fs::remove_file(walk(&dir.join("store/chunks")).next().unwrap()).unwrap();
    assert!(ok(dir, &["image", "inspect", "b-bad"]).contains(", 1 missing here"));
    fs::write(dir.join("small.raw"), [7; 512]).unwrap();
    ok(dir, &["image", "import", "small.raw", "--name", "c-good"]);
    fs::write(dir.join("store/tags/a-rnd"), "garbage").unwrap();

    let out = bedplate(dir, &["image", "verify", "-o", "json"]);
    assert_eq!(out.status.code(), Some(1));
    let (said, list) = (String::from_utf8(out.stderr).unwrap(), serde_json::from_slice(&out.stdout).unwrap());
    let list: serde_json::Value = list;
    let names = [0, 1, 2].map(|i| (list[i]["name"].as_str().unwrap(), list[i]["error"].as_str().is_some()));
    assert_eq!(names, [("a-rnd", true), ("b-bad", true), ("c-good", false)], "{list:#}");
    assert_eq!(list[2]["size"].as_u64(), Some(512), "the shape of a good one stays");
    assert!(list[1]["error"].as_str().unwrap().contains("chunk"), "{list:#}");
    assert!(said.contains("a-rnd: ") && said.contains("b-bad: ") && said.contains("c-good: 512 B are"), "{said}");
    assert!(said.lines().last().unwrap().starts_with("bedplate: 2 of 3 images are damaged"), "{said}");
}

#[test]
fn a_damaged_name_is_listed_apart_with_what_removes_it() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    disk(dir, "disk.raw");
    ok(dir, &["image", "import", "disk.raw", "--name", "good"]);
    fs::write(dir.join("store/tags/rnd"), "garbage").unwrap();
    fs::create_dir(dir.join("store/tags/dir")).unwrap();
    fs::write(dir.join("store/tags/dangling"), format!("blake3:{}\n", "1".repeat(64))).unwrap();
    let out = bedplate(dir, &["image", "ls"]);
    assert_eq!(out.status.code(), Some(1));
    let (list, said) = (String::from_utf8(out.stdout).unwrap(), String::from_utf8(out.stderr).unwrap());
    assert!(list.contains("good") && list.lines().count() == 2, "{list}");
    assert!(said.lines().last().unwrap().starts_with("bedplate: 3 names"), "{said}");
    assert!(fails(dir, &["image", "gc"]).contains("`bedplate image rm "));
    for name in ["rnd", "dir", "dangling"] {
        assert!(said.contains(&format!("{name}: ")) && said.contains(&format!("`bedplate image rm {name} ")), "{said}");
        ok(dir, &["image", "rm", name, "--store", dir.join("store").to_str().unwrap()]);
    }
    assert_eq!(ok(dir, &["image", "ls"]), list);
    ok(dir, &["image", "gc"]);
}

#[test]
fn a_name_that_moves_says_what_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    disk(dir, "disk.raw");
    fs::write(dir.join("small.raw"), [7; 512]).unwrap();
    let said = |file: &str| {
        let out = bedplate(dir, &["image", "import", file, "--name", "mine", "-o", "json"]);
        let image: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
        (image["digest"].as_str().unwrap().to_owned(), String::from_utf8(out.stderr).unwrap())
    };
    let (first, new) = said("disk.raw");
    let (_, same) = said("disk.raw");
    assert!(!new.contains("before") && !same.contains("before"), "{new}{same}");
    let (_, moved) = said("small.raw");
    assert!(moved.contains(&format!("mine was {first} before")), "{moved}");
    let help = ok(dir, &["image", "import", "--help"]);
    assert!(help.split_whitespace().collect::<Vec<_>>().join(" ").contains("stderr says what it was"), "{help}");
}

#[test]
fn the_digits_that_ls_prints_name_an_image() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    disk(dir, "disk.raw");
    ok(dir, &["image", "import", "disk.raw", "--name", "mine"]);
    let list = ok(dir, &["image", "ls"]);
    let short = list.lines().nth(1).unwrap().split_whitespace().nth(1).unwrap();
    assert_eq!(ok(dir, &["image", "inspect", short]), ok(dir, &["image", "inspect", "mine"]));
    ok(dir, &["image", "verify", &format!("blake3:{short}")]);
    // Digits that were accepted as a digest do not become a name by the way.
    let said = fails(dir, &["image", "push", short, "--control", "unix:/nowhere"]);
    assert!(said.contains("--as"), "{said}");
}

#[test]
fn no_store_is_made_among_other_things_or_where_none_can_be() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    disk(dir, "disk.raw");
    for store in [dir.to_str().unwrap(), "/proc/x"] {
        let said = fails(dir, &["image", "import", "disk.raw", "--name", "x", "--store", store]);
        assert!(said.contains(store) && said.contains("name another"), "{said}");
    }
    assert_eq!(fs::read_dir(dir).unwrap().count(), 1, "only the disk");
}

fn walk(dir: &Path) -> impl Iterator<Item = std::path::PathBuf> {
    let shards = fs::read_dir(dir).unwrap().map(|shard| shard.unwrap().path());
    shards.flat_map(|shard| fs::read_dir(shard).unwrap().map(|file| file.unwrap().path()))
}

#[test]
fn bad_files_and_names_are_refused_with_a_reason() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("empty"), "").unwrap();
    fs::write(dir.path().join("odd"), [1; 700]).unwrap();
    assert!(Command::new("mkfifo").arg(dir.path().join("pipe")).status().unwrap().success());
    disk(dir.path(), "disk.raw");
    for (args, word) in [
        (["image", "import", "pipe", "--name", "x"], "pipe is a named pipe"),
        (["image", "import-vmm", "--kernel=pipe", "--initrd=disk.raw", "--name=x"], "pipe is a named pipe"),
        (["image", "import-vmm", "--kernel=/dev/zero", "--initrd=disk.raw", "--name=x"], "/dev/zero is a character"),
        (["image", "import", "absent", "--name", "x"], "absent"),
        (["image", "import", "empty", "--name", "x"], "empty"),
        (["image", "import", "odd", "--name", "x"], "odd"),
        (["image", "import", ".", "--name", "x"], "."),
        (["image", "import", "disk.raw", "--name", "No/Name"], "No/Name"),
    ] {
        let said = fails(dir.path(), &args);
        assert!(said.contains(word), "{said}");
    }
    assert_eq!(ok(dir.path(), &["image", "ls"]), "", "nothing is left behind");
}

#[test]
fn a_control_node_that_is_away_is_said_to_be_away() {
    let dir = tempfile::tempdir().unwrap();
    let socket = format!("unix:{}/control.sock", dir.path().display());
    for args in [
        &["node", "ls", "--control", &socket][..],
        &["tier", "--control", &socket, "scale", "web", "3"],
        &["image", "ls", "--control", &socket],
        &["events", "--control", &socket],
    ] {
        let said = fails(dir.path(), args);
        assert!(said.contains(&socket) && said.contains("BEDPLATE_CONTROL"), "{said}");
    }
}

#[test]
fn a_wrong_command_line_is_told_from_a_failure() {
    let dir = tempfile::tempdir().unwrap();
    for args in [
        &["nonsense"][..],
        &["run"],
        &["tier", "create", "x"],
        &["run", "x", "--cpus", "9"],
        &["image", "ls", "--control", "x"],
        // docs/cli.md says so.
        &["--control", "unix:/x", "node", "ls"],
        &["--store", "/x", "image", "ls"],
    ] {
        assert_eq!(bedplate(dir.path(), args).status.code(), Some(2), "{args:?}");
    }
    for shell in ["bash", "zsh", "fish"] {
        assert!(ok(dir.path(), &["completion", shell]).contains("bedplate"));
    }
}
