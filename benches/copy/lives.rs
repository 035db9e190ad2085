//! The other processes: this program again, with the name of a life as its first argument.
//!
//! A server prints its address and serves until it is killed; a client does its work, prints a [`Took`], and ends.

use std::io::Write;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Instant;

use axum::Router;
use axum::body::Body;
use axum::routing::get;
use bedplate_api::client::{Client, Endpoint};
use bedplate_api::node::Ipv4Net;
use bedplate_api::{Digest, NodeId};
use bedplate_controller::control::Options;
use bedplate_controller::serve::{Listen, Serving};
use bedplate_images::Store;
use bedplate_node::image::{CopyLimits, Images};
use tokio::io::AsyncWriteExt;
use tokio::sync::watch;
use tokio_util::io::ReaderStream;

use crate::process::{Took, cpu_seconds};

/// Of the plain server's reads: larger ones made it no faster.
const READ: usize = 256 << 10;

/// Whether this process is one of them; then it has done its work.
pub fn lived() -> bool {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    // As `bedplate-control` and `bedplate-node` start theirs.
    match words[..] {
        ["control", state] => run(control(state.into())),
        ["plain-server", file] => run(plain_server(file.to_owned())),
        ["node", address, token, image, state] => {
            run(node(address.to_owned(), token.to_owned(), image.parse().unwrap(), state.into()));
        }
        ["plain-client", address, file] => run(plain_client(address.to_owned(), file.into())),
        _ => return false,
    }
    true
}

/// On a worker of the runtime, as all that they do is, and not on the thread that only waits for its end.
fn run(life: impl Future<Output = ()> + Send + 'static) {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(runtime.spawn(life)).unwrap();
}

fn say(line: impl std::fmt::Display) {
    println!("{line}");
    std::io::stdout().flush().unwrap();
}

/// A control node over `state`, whose repository is there already.
async fn control(state: PathBuf) {
    let network = |second, prefix| Ipv4Net { address: [10, second, 0, 0].into(), prefix };
    let options = Options {
        state: state.clone(),
        node_listen: Some(([127, 0, 0, 1], 0).into()),
        netboot: None,
        node_network: network(77, 24),
        vm_network: network(78, 16),
        vmm_image: "vmm".to_owned(),
        slots_per_node: 8,
        node_cmdline: String::new(),
        boot_deadline: 300,
        lost_after: 15,
    };
    let listen = Listen { socket: state.join("control.sock"), page: None };
    let mut serving = Serving::start(options, listen).await.unwrap();
    say(serving.node_address.unwrap());
    panic!("{}", serving.failed().await);
}

/// A node that has nothing and takes `image`. Like one of a cluster it asks before each batch whom to have it from; that it
/// is not known there makes the answer "from the repository".
async fn node(address: String, token: String, image: Digest, state: PathBuf) {
    let store = Store::create(state.join("images")).unwrap();
    let source = Client::new(Endpoint::Http(address), Some(token.clone())).unwrap();
    let images = Images::new(store, &state, Some(source), CopyLimits::default());
    let images = images.share(NodeId::random(), token);
    let progress = watch::Sender::new(None);
    let begun = Instant::now();
    let (_, manifest) = images.begin(image, &progress).await.unwrap();
    let started = begun.elapsed().as_secs_f64();
    // Its end is a name that survives a power cut, so everything is synced by then.
    images.finish(image, &manifest, &progress).await.unwrap();
    say(Took { written: started, synced: begun.elapsed().as_secs_f64(), cpu: cpu_seconds("self") });
}

/// Serves `file` in the way that the libraries offer.
async fn plain_server(file: String) {
    let serve = async move || {
        let file = tokio::fs::File::open(&file).await.unwrap();
        Body::from_stream(ReaderStream::with_capacity(file, READ))
    };
    let listener = tokio::net::TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], 0))).await.unwrap();
    say(listener.local_addr().unwrap());
    axum::serve(listener, Router::new().route("/", get(serve))).await.unwrap();
}

async fn plain_client(address: String, path: PathBuf) {
    let client = bedplate_api::client::plain_http().build().unwrap();
    let begun = Instant::now();
    let mut response = client.get(format!("http://{address}/")).send().await.unwrap();
    let mut file = tokio::fs::File::create(path).await.unwrap();
    while let Some(bytes) = response.chunk().await.unwrap() {
        file.write_all(&bytes).await.unwrap();
    }
    file.flush().await.unwrap();
    let written = begun.elapsed().as_secs_f64();
    file.sync_all().await.unwrap();
    say(Took { written, synced: begun.elapsed().as_secs_f64(), cpu: cpu_seconds("self") });
}
