//! The real command: signed images, and a store that asks for signatures.

// Helpers of tests are tests: a panic there is the failure report.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use minisign::KeyPair;

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
    let said = String::from_utf8(out.stderr).unwrap();
    assert!(out.status.success(), "{args:?}: {said}");
    said
}

fn fails(dir: &Path, args: &[&str]) -> String {
    let out = bedplate(dir, args);
    let said = String::from_utf8(out.stderr).unwrap();
    assert_eq!(out.status.code(), Some(1), "{args:?}: {said}");
    said.lines().last().unwrap_or_default().to_owned()
}

/// Writes a key pair without a password, as `minisign -GW` does.
fn keys(dir: &Path, name: &str) {
    let pair = KeyPair::generate_unencrypted_keypair().unwrap();
    fs::write(dir.join(format!("{name}.pub")), pair.pk.to_box().unwrap().to_string()).unwrap();
    fs::write(dir.join(format!("{name}.sec")), pair.sk.to_box(None).unwrap().to_string()).unwrap();
}

#[test]
fn what_is_signed_is_verified_with_the_right_key_only() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    fs::write(dir.join("disk.raw"), [7; 4096]).unwrap();
    ok(dir, &["image", "import", "disk.raw", "--name", "a"]);
    keys(dir, "ops");
    keys(dir, "other");
    assert!(fails(dir, &["image", "verify", "a", "--key", "ops.pub"]).contains("it is not signed"));
    assert!(ok(dir, &["image", "sign", "a", "--key", "ops.sec"]).contains("is signed"));
    assert!(ok(dir, &["image", "verify", "a", "--key", "ops.pub"]).contains("a is signed with ops"));
    let said = fails(dir, &["image", "verify", "a", "--key", "other.pub"]);
    assert!(said.contains("not one of the image blake3:") && said.contains("by that key"), "{said}");
    let said = fails(dir, &["image", "sign", "a", "--key", "ops.pub"]);
    assert!(said.contains("ops.pub cannot be used to sign") && said.contains("minisign -G"), "{said}");
    let said = fails(dir, &["image", "sign", "a", "--signature", "disk.raw"]);
    assert!(said.contains("is not a minisign signature") || said.contains("cannot read"), "{said}");
}

#[test]
fn a_store_with_keys_runs_nothing_that_they_did_not_sign() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    fs::write(dir.join("disk.raw"), [7; 4096]).unwrap();
    ok(dir, &["image", "import", "disk.raw", "--name", "a"]);
    keys(dir, "ops");
    fs::create_dir(dir.join("store/trust")).unwrap();
    fs::copy(dir.join("ops.pub"), dir.join("store/trust/ops.pub")).unwrap();
    // Emulated, so that a machine without KVM comes as far as this.
    let run = |image: &str| fails(dir, &["run", "--lab", image]);
    let unsigned = run("a");
    assert!(unsigned.contains("is not signed") && unsigned.contains("bedplate image sign"), "{unsigned}");
    assert!(run("./disk.raw").contains("is not signed"), "a file is no way around it");
    ok(dir, &["image", "sign", "a", "--key", "ops.sec"]);
    let signed = run("a");
    assert!(!signed.contains("signed") && signed.contains("vmm"), "the VMM image is missing next: {signed}");
}
