//! Frames that do not reach the link: those between the guest and its metadata server.
//!
//! All pairs of queues share one server: the guest sends to it over any of them, and hears from it over the first.

use std::io;
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use super::HEADER_LEN;
use crate::metadata::{Destination, HEAD_LEN, Responder};
use crate::virtio::View;
use crate::virtio::timer::Timer;

/// A server beside the link, and its timer.
pub(super) struct Aside {
    /// Looked at for each frame, without the server's lock.
    destination: Destination,
    /// Taken for frames to and from the server only. Lock order: after a gate's.
    server: Mutex<Server>,
    timer: Timer,
}

/// The server, while somebody works with it.
pub(super) struct Server {
    responder: Responder,
    frame: Vec<u8>,
}

impl Aside {
    pub(super) fn open(responder: Responder) -> io::Result<Self> {
        let destination = responder.destination();
        Ok(Self { destination, server: Mutex::new(Server { responder, frame: Vec::new() }), timer: Timer::open()? })
    }

    pub(super) fn timer(&self) -> &Timer {
        &self.timer
    }

    /// To hand over what it has for the guest.
    pub(super) fn lock(&self) -> MutexGuard<'_, Server> {
        self.server.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Takes a frame, virtio header included, if it is for the server.
    pub(super) fn take(&self, frame: View<'_>) -> bool {
        let mut head = [0; HEADER_LEN + HEAD_LEN];
        let len = frame.copy_to(&mut head);
        if len < head.len() || !self.destination.is_of(&head[HEADER_LEN..]) {
            return false;
        }
        let mut server = self.lock();
        let Server { responder, frame: copy } = &mut *server;
        copy.resize(frame.len(), 0);
        frame.copy_to(copy);
        responder.take(&copy[HEADER_LEN..]);
        self.set_timer(responder);
        true
    }

    /// The timer has run out.
    pub(super) fn go_on(&self) {
        self.timer.expired();
        let mut server = self.lock();
        server.responder.work();
        self.set_timer(&mut server.responder);
    }

    /// A new driver: nothing of the old one's goes on.
    pub(super) fn reset(&self) {
        let mut server = self.lock();
        server.responder.reset();
        self.set_timer(&mut server.responder);
    }

    fn set_timer(&self, responder: &mut Responder) {
        match responder.delay() {
            Some(delay) => self.timer.once(delay),
            None => self.timer.every(Duration::ZERO),
        }
    }
}

impl Server {
    /// The next frame for the guest, without a header.
    pub(super) fn frame(&self) -> Option<&[u8]> {
        self.responder.frame()
    }

    /// It was handed over, or never will be.
    pub(super) fn drop_frame(&mut self) {
        self.responder.drop_frame();
    }
}
