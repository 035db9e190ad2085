//! A backend that does nothing with its rings, and answers as its test wants.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use vhost::vhost_user::message::FrontendReq as Request;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::virtio::vhost_user::{Frontend, VhostUserError};

/// What a backend says here has to come within this.
pub(super) const PATIENCE: Duration = Duration::from_millis(300);
pub(super) const PROTOCOL: u64 = 1 << 30;
pub(super) const VERSION_1: u64 = 1 << 32;

/// What it does with one kind of message.
#[derive(Clone)]
pub(super) enum Answer {
    /// As long as it is there.
    Silence,
    Close,
    /// This in the place of the payload of a good answer.
    Payload(Vec<u8>),
    /// These bytes in the place of a whole answer.
    Raw(Vec<u8>),
    /// A good answer, a byte at a time.
    Trickle,
}

/// One message that it got.
pub(super) struct Heard {
    pub(super) request: u32,
    pub(super) payload: Vec<u8>,
    pub(super) file: Option<File>,
}

/// What it is like.
#[derive(Clone)]
pub(super) struct Script {
    pub(super) features: u64,
    /// Of the protocol: several queues, acknowledgements and configuration, unless a test says otherwise.
    pub(super) protocol: u64,
    pub(super) queues: u64,
    pub(super) config: Vec<u8>,
    /// The message that it does something else with, from its n-th on.
    pub(super) twist: Option<(Request, usize, Answer)>,
}

impl Default for Script {
    fn default() -> Self {
        let mut config = vec![0; 60];
        config[..8].copy_from_slice(&2048u64.to_le_bytes());
        Self { features: VERSION_1 | PROTOCOL, protocol: 0b10_0000_1001 | 1, queues: 4, config, twist: None }
    }
}

/// The backend, at work. It ends with the connection.
pub(super) struct Scripted {
    pub(super) heard: Arc<Mutex<Vec<Heard>>>,
    /// Its end of the connection.
    stream: UnixStream,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Scripted {
    fn drop(&mut self) {
        // Fails where the frontend was faster.
        let _ = self.stream.shutdown(std::net::Shutdown::Both);
        if let Some(thread) = self.thread.take() {
            // A test that has failed already has nothing to gain from this.
            let _ = thread.join();
        }
    }
}

impl Scripted {
    /// The other end of a connection to it, which has said hello.
    pub(super) fn start(script: Script) -> (Result<Frontend, VhostUserError>, Self) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let stream = theirs.try_clone().unwrap();
        let heard = Arc::<Mutex<Vec<Heard>>>::default();
        let thread = {
            let heard = Arc::clone(&heard);
            // Silent ones wait for the frontend to close.
            thread::spawn(move || while serve(&theirs, &script, &heard).is_some() {})
        };
        (Frontend::over(ours, "/run/b".into(), PATIENCE), Self { heard, stream, thread: Some(thread) })
    }

    /// Payloads of all messages of this kind.
    pub(super) fn payloads(&self, request: Request) -> Vec<Vec<u8>> {
        let heard = self.heard.lock().unwrap();
        heard.iter().filter(|heard| heard.request == u32::from(request)).map(|heard| heard.payload.clone()).collect()
    }

    /// The descriptor that came with the last message of this kind.
    pub(super) fn file(&self, request: Request) -> File {
        let heard = self.heard.lock().unwrap();
        let last = heard.iter().rfind(|heard| heard.request == u32::from(request)).unwrap();
        last.file.as_ref().unwrap().try_clone().unwrap()
    }
}

/// Takes a message and answers it; none at the end.
fn serve(stream: &UnixStream, script: &Script, heard: &Mutex<Vec<Heard>>) -> Option<()> {
    let mut header = [0; 12];
    let (count, file) = stream.recv_with_fd(&mut header).ok().filter(|(count, _)| *count > 0)?;
    let mut stream = stream;
    stream.read_exact(&mut header[count..]).ok()?;
    let field = |at: usize| u32::from_ne_bytes(header[at..at + 4].try_into().unwrap());
    let (request, flags, len) = (field(0), field(4), field(8));
    let mut payload = vec![0; len as usize];
    stream.read_exact(&mut payload).ok()?;
    let is = |kind: Request| request == u32::from(kind);
    let number = |number: u64| Some(number.to_ne_bytes().to_vec());
    let answer = match () {
        () if is(Request::GET_FEATURES) => number(script.features),
        () if is(Request::GET_PROTOCOL_FEATURES) => number(script.protocol),
        () if is(Request::GET_QUEUE_NUM) => number(script.queues),
        () if is(Request::GET_CONFIG) => Some([&payload[..12], &script.config].concat()),
        () if is(Request::GET_VRING_BASE) => Some(payload.clone()),
        () if flags & 8 != 0 => number(0),
        () => None,
    };
    heard.lock().unwrap().push(Heard { request, payload, file });
    let times = heard.lock().unwrap().iter().filter(|heard| heard.request == request).count();
    let twist = script.twist.as_ref().filter(|(kind, from, _)| is(*kind) && times >= *from);
    let twist = twist.map(|(_, _, twist)| twist);
    let whole = |payload: &[u8]| {
        [request, 5, payload.len() as u32].iter().flat_map(|n| n.to_ne_bytes()).chain(payload.iter().copied()).collect()
    };
    let bytes: Vec<u8> = match (twist, answer) {
        (Some(Answer::Silence), _) => return Some(()),
        (Some(Answer::Close), _) => return stream.shutdown(std::net::Shutdown::Both).ok().and(None),
        (Some(Answer::Payload(payload)), _) => whole(payload),
        (Some(Answer::Raw(bytes)), _) => bytes.clone(),
        (Some(Answer::Trickle), Some(answer)) => {
            for byte in whole(&answer) {
                thread::sleep(PATIENCE / 10);
                stream.write_all(&[byte]).ok()?;
            }
            return Some(());
        }
        (_, None) => return Some(()),
        (None, Some(answer)) => whole(&answer),
    };
    stream.write_all(&bytes).ok()
}

/// Sends `bytes` with a descriptor that nobody asked for.
pub(super) fn send_with(stream: &UnixStream, bytes: &[u8], unasked: &impl AsRawFd) {
    assert_eq!(stream.send_with_fd(bytes, unasked.as_raw_fd()).unwrap(), bytes.len());
}
