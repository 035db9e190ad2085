//! The real command against somebody else's registry: Debian's `docker-registry`, on loopback, with its files in a
//! directory of its own.

// Helpers of tests are tests: a panic there is the failure report.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// Ends with its owner.
struct Registry {
    process: Child,
    port: u16,
    dir: PathBuf,
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Registry {
    /// One with its files in `dir`; `None`, with a line that says so, where the program is not installed.
    fn start(dir: &Path, extra: &str) -> Option<Self> {
        // Free now; nothing else on a test machine takes ports of this kind between here and there.
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let dir = dir.join("registry");
        fs::create_dir_all(&dir).unwrap();
        let config = format!(
            "version: 0.1\nstorage:\n  filesystem:\n    rootdirectory: {}\nhttp:\n  addr: 127.0.0.1:{port}\n{extra}",
            dir.display()
        );
        let file = dir.join("config.yml");
        fs::write(&file, config).unwrap();
        let mut command = Command::new("docker-registry");
        let command = command.arg("serve").arg(&file).stdout(Stdio::null()).stderr(Stdio::null());
        let Ok(process) = command.spawn() else {
            println!("skipped: needs docker-registry (package docker-registry)");
            return None;
        };
        let registry = Self { process, port, dir };
        let deadline = Instant::now() + Duration::from_secs(20);
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            assert!(Instant::now() < deadline, "docker-registry does not listen");
            std::thread::sleep(Duration::from_millis(20));
        }
        Some(registry)
    }

    fn name(&self, name: &str) -> String {
        format!("oci://127.0.0.1:{}/{name}", self.port)
    }
}

/// Runs the command in `dir` with the store `store`.
fn bedplate(dir: &Path, store: &str, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_bedplate"))
        .args(args)
        .current_dir(dir)
        .env("BEDPLATE_STORE", dir.join(store))
        .env("DOCKER_CONFIG", dir.join("docker"))
        .output()
        .unwrap()
}

/// What it said on stderr.
fn ok(dir: &Path, store: &str, args: &[&str]) -> String {
    let out = bedplate(dir, store, args);
    let said = String::from_utf8(out.stderr).unwrap();
    assert!(out.status.success(), "{args:?}: {said}");
    said
}

fn fails(dir: &Path, store: &str, args: &[&str]) -> String {
    let out = bedplate(dir, store, args);
    let said = String::from_utf8(out.stderr).unwrap();
    assert_eq!(out.status.code(), Some(1), "{args:?}: {said}");
    said.lines().last().unwrap_or_default().to_owned()
}

/// Bytes that do not compress.
fn noise(seed: u32, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(2_654_435_761) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state as u8
    };
    std::iter::repeat_with(&mut next).take(len).collect()
}

/// A disk of 48 MiB, of which 40 are full, and one that differs from it in one place.
fn disks(dir: &Path) -> Vec<u8> {
    let mut bytes = noise(1, 40 << 20);
    bytes.resize(48 << 20, 0);
    fs::write(dir.join("one.raw"), &bytes).unwrap();
    let mut other = bytes.clone();
    other[5 << 20..][..1 << 20].copy_from_slice(&noise(2, 1 << 20));
    fs::write(dir.join("two.raw"), &other).unwrap();
    other
}

fn digest(dir: &Path, store: &str, name: &str) -> String {
    let out = bedplate(dir, store, &["image", "inspect", name, "-o", "json"]);
    let image: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    image["digest"].as_str().unwrap().to_owned()
}

#[test]
fn an_image_goes_through_a_registry_and_only_what_is_new_is_sent_and_fetched() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let Some(registry) = Registry::start(dir, "") else { return };
    let two = disks(dir);
    ok(dir, "a", &["image", "import", "one.raw", "--name", "one"]);
    ok(dir, "a", &["image", "import", "two.raw", "--name", "two"]);
    let (first, second) = (registry.name("team/web:1"), registry.name("team/web:2"));
    let said = ok(dir, "a", &["image", "push", "one", &first, "--insecure"]);
    assert!(said.contains("2 of 2 packs sent (40."), "{said}");
    let said = ok(dir, "a", &["image", "push", "one", &first, "--insecure"]);
    assert!(said.contains("0 of 2 packs sent"), "{said}");
    // Both packs are of use still; what differs goes into a third.
    let said = ok(dir, "a", &["image", "push", "two", &second, "--insecure"]);
    assert!(said.contains("1 of 3 packs sent (1.0 MiB)"), "{said}");

    let said = ok(dir, "b", &["image", "pull", &first, "--insecure"]);
    assert!(said.contains("640 of 640 chunks fetched (40."), "{said}");
    assert_eq!(digest(dir, "b", "web"), digest(dir, "a", "one"), "its name is the last part of its place");
    let said = ok(dir, "b", &["image", "pull", &second, "--insecure", "--as", "two"]);
    assert!(said.contains("16 of 640 chunks fetched (1.0 MiB)"), "{said}");
    assert_eq!(digest(dir, "b", "two"), digest(dir, "a", "two"));
    ok(dir, "b", &["image", "verify"]);
    ok(dir, "b", &["image", "export", "two", "out.raw"]);
    assert!(fs::read(dir.join("out.raw")).unwrap() == two);
    assert!(ok(dir, "b", &["image", "pull", &second, "--insecure", "--as", "two"]).contains("0 of 640"));

    let unknown = fails(dir, "b", &["image", "pull", &registry.name("team/db:1"), "--insecure"]);
    assert!(unknown.contains("there is no image oci://127.0.0.1") && unknown.contains("team/db:1"), "{unknown}");
    let https = fails(dir, "b", &["image", "pull", &first]);
    assert!(https.contains("--insecure"), "{https}");
    for bad in ["oci://", "oci://HOST/UPPER", "oci://127.0.0.1:1/a b"] {
        let said = fails(dir, "b", &["image", "pull", bad]);
        assert!(said.contains("write oci://HOST[:PORT]/NAME[:TAG]"), "{said}");
    }
    let by_digest = format!("{}@sha256:{}", registry.name("x"), "0".repeat(64));
    assert!(fails(dir, "a", &["image", "push", "one", &by_digest, "--insecure"]).contains("write a tag"));
}

#[test]
fn damage_in_the_registry_is_found_and_nothing_gets_a_name() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let Some(registry) = Registry::start(dir, "") else { return };
    disks(dir);
    ok(dir, "a", &["image", "import", "one.raw", "--name", "one"]);
    let place = registry.name("web:1");
    ok(dir, "a", &["image", "push", "one", &place, "--insecure"]);
    let blobs: Vec<(PathBuf, Vec<u8>)> = walk(&registry.dir.join("docker/registry/v2/blobs"))
        .into_iter()
        .map(|path| (path.clone(), fs::read(path).unwrap()))
        .collect();
    assert_eq!(blobs.len(), 5, "manifest of the registry and of the image, index, two packs");
    for (number, (path, whole)) in blobs.iter().enumerate() {
        let places =
            if whole.len() > 1 << 20 { vec![4, 14, 30, 30_000, whole.len() - 9] } else { vec![whole.len() / 2] };
        for at in places {
            let mut bytes = whole.clone();
            bytes[at] ^= 0x10;
            fs::write(path, &bytes).unwrap();
            let store = format!("damaged-{number}-{at}");
            let said = fails(dir, &store, &["image", "pull", &place, "--insecure"]);
            assert!(said.contains("oci://127.0.0.1") || said.contains("chunk"), "{said}");
            let out = bedplate(dir, &store, &["image", "ls", "-o", "json"]);
            assert_eq!(String::from_utf8_lossy(&out.stdout).trim(), "[]");
            if number == 0 {
                // What landed stays: the next pull goes on from there.
                fs::write(path, whole).unwrap();
                ok(dir, &store, &["image", "pull", &place, "--insecure"]);
            }
            fs::remove_dir_all(dir.join(&store)).unwrap();
        }
        // A blob that is cut off.
        fs::write(path, &whole[..whole.len() / 2]).unwrap();
        fails(dir, "cut", &["image", "pull", &place, "--insecure"]);
        // What landed would be enough for the next one.
        fs::remove_dir_all(dir.join("cut")).unwrap();
        fs::write(path, whole).unwrap();
    }
}

fn walk(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() { found.extend(walk(&path)) } else { found.push(path) }
    }
    found.sort();
    found
}

#[test]
fn credentials_come_from_dockers_configuration() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    // Of the user "me" with the password "secret".
    fs::write(dir.join("htpasswd"), "me:$2y$05$abcdefghijklmnopqrstuuOQiyCxlgf/oeuTqixKmWdcYUh4Hjl0a\n").unwrap();
    let auth = format!("auth:\n  htpasswd:\n    realm: here\n    path: {}\n", dir.join("htpasswd").display());
    let Some(registry) = Registry::start(dir, &auth) else { return };
    fs::write(dir.join("small.raw"), [7; 4096]).unwrap();
    ok(dir, "a", &["image", "import", "small.raw", "--name", "small"]);
    let place = registry.name("small:1");
    let said = fails(dir, "a", &["image", "push", "small", &place, "--insecure"]);
    assert!(said.contains("wants other credentials") && said.contains("docker login"), "{said}");
    let log_in = |encoded: &str| {
        fs::create_dir_all(dir.join("docker")).unwrap();
        let config = format!(r#"{{"auths": {{"127.0.0.1:{}": {{"auth": "{encoded}"}}}}}}"#, registry.port);
        fs::write(dir.join("docker/config.json"), config).unwrap();
    };
    // me:wrong, then me:secret
    log_in("bWU6d3Jvbmc=");
    let said = fails(dir, "a", &["image", "push", "small", &place, "--insecure"]);
    assert!(said.contains("are not enough"), "{said}");
    log_in("bWU6c2VjcmV0");
    ok(dir, "a", &["image", "push", "small", &place, "--insecure"]);
    ok(dir, "b", &["image", "pull", &place, "--insecure"]);
    assert_eq!(digest(dir, "a", "small"), digest(dir, "b", "small"));
}
