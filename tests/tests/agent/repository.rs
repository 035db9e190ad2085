//! A control node in the node, for its repository: where images come from that are not here.

use std::fs::{self, File};
use std::io::{Seek, SeekFrom};
use std::ops::ControlFlow;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::Result;
use bedplate_api::Digest;
use bedplate_images::Store;
use bedplate_images::import::{self, Options};
use bedplate_lab::Process;
use bedplate_tests::inside::{DISK, tools, unix_http};
use bedplate_tests::patience::until;

use crate::agent::PATIENCE;

const DIR: &str = "/run/control";
/// Where it serves.
pub const SOCKET: &str = "/run/control.sock";

/// A disk that boots, followed by bytes that do not compress.
pub struct Content {
    /// The disk as a file; it stays, to compare with.
    pub raw: &'static str,
    /// MiB of the part that boots.
    pub boots_mib: u64,
    /// MiB of the bytes.
    pub more_mib: u64,
    /// MiB in all, the rest zeros; no more than the two unless given.
    pub size_mib: Option<u64>,
}

/// Makes an image of `content` in the repository, which must not serve yet or may.
pub fn image(name: &str, content: &Content) -> Result<Digest> {
    fs::copy(DISK, content.raw)?;
    let more = Path::new("/run/more");
    tools::numbered_file(more, content.more_mib)?;
    let mut raw = File::options().write(true).open(content.raw)?;
    raw.seek(SeekFrom::Start(content.boots_mib << 20))?;
    std::io::copy(&mut File::open(more)?, &mut raw)?;
    fs::remove_file(more)?;
    if let Some(size) = content.size_mib {
        raw.set_len(size << 20)?;
    }
    fs::create_dir_all(DIR)?;
    let store = Store::create(Path::new(DIR).join("images"))?;
    let mut quiet = |_: u64, _: u64| ControlFlow::Continue(());
    let options = Options { tag: Some(name), ..Options::default() };
    Ok(import::import_disk(&store, Path::new(content.raw), options, &mut quiet)?.digest)
}

/// Starts the control node and waits until it answers.
pub fn serve() -> Result<Process> {
    tools::busybox(&["ip", "link", "set", "lo", "up"])?;
    let mut command = Command::new("/bin/bedplate-control");
    command.args(["--state", DIR, "--socket", SOCKET, "--node-listen", "127.0.0.1:7070"]).stdin(Stdio::null());
    let control = Process::start("the control node", command)?;
    until("the control node's answer", PATIENCE, || {
        let answer = unix_http::request(Path::new(SOCKET), "GET", "/v1/images", "");
        Ok(answer.is_ok_and(|(status, _)| status == 200).then_some(()))
    })?;
    Ok(control)
}
