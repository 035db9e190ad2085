//! Capture, with a small node that sends a real disk.

use std::path::PathBuf;

use bedplate_api::Digest;
use bedplate_api::control::{Capture, CapturePhase};
use bedplate_api::error::ErrorKind;
use bedplate_api::image::{ImageKind, Origin};
use bedplate_images::Store;
use bedplate_images::disk::{Disk, Mode};
use bedplate_images::frame::chunk_buffer;

use crate::testing::{Bench, SmallNode, tier, until};

/// A control node whose node has the VM web-1, a child of the image `digest`, with a disk that begins with [`NEWS`].
async fn bench() -> (Bench, SmallNode, Digest) {
    let bench = Bench::start().await;
    let digest = bench.push("web", ImageKind::Disk).await;
    let node = SmallNode::start(&bench.serving.control.token).await;
    let store = Store::open(bench.dir.path().join("local")).unwrap();
    let mut disk = Disk::create(&bench.dir.path().join("disk"), &store, &digest, Mode::Persistent).unwrap();
    disk.write_at(NEWS, 0).unwrap();
    disk.send(&mut node.heard.lock().unwrap().disk).unwrap();
    node.register(&bench.nodes, None).await;
    bench.people.create_tier(&tier("web", "web", 1)).await.unwrap();
    until("the node has the VM", async || (node.names() == ["web-1"]).then_some(())).await;
    (bench, node, digest)
}

const NEWS: &[u8] = b"what the guest wrote";

fn capture(keep_identity: bool) -> Capture {
    Capture { image: "golden".to_owned(), keep_identity }
}

/// Scratch directories of the repository.
fn scratch(bench: &Bench) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(bench.serving.control.images.dir().join("tmp")).unwrap();
    entries.map(|entry| entry.unwrap().path()).filter(|path| path.is_dir()).collect()
}

#[tokio::test]
async fn a_vms_disk_becomes_an_image() {
    let (bench, _node, parent) = bench().await;
    let mut phases = Vec::new();
    let captured = bench.people.capture_vm("web-1", &capture(true), |phase, _, _| phases.push(phase)).await.unwrap();
    assert!(phases.contains(&CapturePhase::Clean), "{phases:?}");
    assert_eq!(captured.unfrozen.as_deref(), Some("no agent"));
    assert!(captured.reused > 0 && captured.chunks > captured.reused, "{captured:?}");
    let images = &bench.serving.control.images;
    let digest = images.tag("golden").unwrap();
    assert_eq!(captured.image.digest, digest);
    // Nobody can look into some bytes.
    let (captured_from, unique) = ("web-1".to_owned(), None);
    let origin = Origin { parent, captured_from, at_rest: false, unique };
    assert_eq!(images.manifest(&digest).unwrap().origin, Some(origin));
    let disk = images.part(&digest, "disk").unwrap();
    let mut first = chunk_buffer();
    disk.read(0, &disk.digest(0).unwrap(), &mut first).unwrap();
    assert_eq!(first[..NEWS.len()], *NEWS);
    let events = bench.events().await;
    assert!(events.iter().any(|event| event.message.ends_with("captured from web-1")), "{events:?}");
    assert_eq!(scratch(&bench), Vec::<PathBuf>::new());
}

#[tokio::test]
async fn a_capture_that_fails_says_why_and_leaves_nothing() {
    let (bench, node, _) = bench().await;
    let fails = async |name: &str, request: &Capture| {
        let Err(error) = bench.people.capture_vm(name, request, |_, _, _| {}).await else { panic!("it works") };
        (error.kind(), error.to_string())
    };
    let (kind, error) = fails("nobody", &capture(true)).await;
    assert!(kind == Some(ErrorKind::NotFound) && error.contains("nobody"), "{error}");
    let (kind, error) = fails("web-1", &Capture { image: "../x".to_owned(), ..capture(true) }).await;
    assert!(kind == Some(ErrorKind::BadRequest) && error.contains("../x"), "{error}");
    // Some bytes are no system.
    let (kind, error) = fails("web-1", &capture(false)).await;
    assert!(kind == Some(ErrorKind::BadRequest) && error.contains("--keep-identity"), "{error}");
    let whole = node.heard.lock().unwrap().disk.clone();
    node.heard.lock().unwrap().disk.truncate(whole.len() - 1);
    let (kind, error) = fails("web-1", &capture(true)).await;
    assert!(kind == Some(ErrorKind::Unavailable) && error.contains("did not arrive whole"), "{error}");
    node.heard.lock().unwrap().disk = whole.iter().rev().copied().collect();
    let (kind, error) = fails("web-1", &capture(true)).await;
    assert!(kind == Some(ErrorKind::Unavailable) && error.contains("not the disk"), "{error}");
    assert!(bench.serving.control.images.tag("golden").is_err());
    assert_eq!(scratch(&bench), Vec::<PathBuf>::new());
}
