//! What a blank machine fetches: its script, then the kernel and the initial RAM disk. Without a token, which it does not
//! have yet; the script carries it.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use axum::body::Body as Stream;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use axum::http::header;
use axum::response::{IntoResponse, Response};
use bedplate_api::Digest;
use bedplate_api::error::ErrorKind;
use futures_util::StreamExt;
use serde::Deserialize;
use tokio_util::io::ReaderStream;

use super::Shared;
use super::answer::{Path, Refusal};
use crate::control::{Control, blocking};
use crate::netboot::files::{self, FilesError, Ready};
use crate::netboot::{booting, script};
use crate::records::NodeNumber;
use crate::reports::is_mac;
use crate::store::{NODES, Read};

/// `?mac=…`
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Machine {
    mac: String,
}

impl Machine {
    fn mac(query: Result<Query<Self>, QueryRejection>) -> Result<String, Refusal> {
        let Query(Self { mac }) = query.map_err(|e| Refusal::new(ErrorKind::BadRequest, e.body_text()))?;
        if !is_mac(&mac) {
            return Err(Refusal::new(ErrorKind::BadRequest, format!("{mac:?} is not a MAC address")));
        }
        Ok(mac)
    }
}

/// `GET /boot/ipxe?mac=…`.
pub async fn script(
    State(control): Shared,
    query: Result<Query<Machine>, QueryRejection>,
) -> Result<Response, Refusal> {
    let mac = Machine::mac(query)?;
    let http = reachable(&control).await?;
    let shared = Arc::clone(&control);
    let text = match blocking(move || files::prepare(&shared)).await {
        Ok(ready) => {
            let node = booting(&control, mac.clone()).await?;
            let image = ready.image.short();
            control
                .event(node, format!("fetches its boot script: image {} ({image})", control.options.vmm_image))
                .await;
            let boot = script::Boot {
                image: ready.image,
                initrd: ready.initrd,
                cmdline: cmdline(&control, http, &mac, &ready),
            };
            script::boot(http, &mac, &node.to_string(), &boot)
        }
        Err(error) => {
            if let Some(node) = node_of(&control, &mac).await? {
                control.event_once(node, format!("cannot be booted: {error}; it tries again")).await;
            }
            if !matches!(error, FilesError::NoImage(_)) {
                tracing::error!("{error}");
            }
            script::wait(http, &mac, &error.to_string())
        }
    };
    Ok(([(header::CONTENT_TYPE, "text/plain; charset=utf-8")], text).into_response())
}

/// The address that goes into scripts and command lines.
async fn reachable(control: &Arc<Control>) -> Result<SocketAddr, Refusal> {
    match control.boot_address.get() {
        Some(address) => Ok(*address),
        // Without netboot of our own, a site's boot server may point here; then the address is the one given.
        None => control.options.node_listen.filter(|address| !address.ip().is_unspecified()).ok_or_else(|| {
            Refusal::new(ErrorKind::Unavailable, "--node-listen names no address that a machine could reach")
        }),
    }
}

fn cmdline(control: &Control, http: SocketAddr, mac: &str, ready: &Ready) -> String {
    let options = &control.options;
    let ours = format!(
        "bedplate.control=http://{http} bedplate.token={} bedplate.slots={} bedplate.mac={mac} console=ttyS0 panic=-1",
        control.token, options.slots_per_node
    );
    script::cmdline(&[&ours, &ready.cmdline, &options.node_cmdline])
}

async fn node_of(control: &Arc<Control>, mac: &str) -> Result<Option<NodeNumber>, Refusal> {
    let mac = mac.to_owned();
    let nodes = control.read(|snapshot| snapshot.all(&NODES)).await?;
    Ok(nodes.into_iter().find(|node| node.mac.as_ref() == Some(&mac)).map(|node| node.number))
}

/// `GET /boot/{digest}/{kernel|initrd}?mac=…`; the digest as hex, because iPXE would not take a colon there.
pub async fn part(
    State(control): Shared,
    Path((image, part)): Path<(String, String)>,
    query: Result<Query<Machine>, QueryRejection>,
) -> Result<Response, Refusal> {
    let mac = Machine::mac(query)?;
    let missing = || Refusal::new(ErrorKind::NotFound, format!("there is no {part:?} of image {image:?} to boot"));
    let digest: Digest = format!("blake3:{image}").parse().map_err(|_| missing())?;
    if !matches!(part.as_str(), "kernel" | "initrd") {
        return Err(missing());
    }
    let file = tokio::fs::File::open(files::dir(&control, &digest).join(&part)).await.map_err(|_| missing())?;
    let size = file.metadata().await.map_err(|_| missing())?.len();
    let node = node_of(&control, &mac).await?;
    let stream = counted(ReaderStream::with_capacity(file, 256 << 10), control, node, part, size);
    let headers =
        [(header::CONTENT_TYPE, "application/octet-stream".to_owned()), (header::CONTENT_LENGTH, size.to_string())];
    Ok((headers, stream).into_response())
}

/// Tells people when the last byte was taken.
fn counted(
    stream: ReaderStream<tokio::fs::File>,
    control: Arc<Control>,
    node: Option<NodeNumber>,
    part: String,
    size: u64,
) -> Stream {
    let start = Instant::now();
    let mut sent = 0u64;
    let stream = stream.inspect(move |chunk| {
        let Ok(bytes) = chunk else { return };
        sent = sent.saturating_add(bytes.len() as u64);
        if let Some(node) = node.filter(|_| sent == size) {
            let message = format!("has fetched its {part}: {size} bytes in {:.1} s", start.elapsed().as_secs_f32());
            let control = Arc::clone(&control);
            tokio::spawn(async move { control.event(node, message).await });
        }
    });
    Stream::from_stream(stream)
}
