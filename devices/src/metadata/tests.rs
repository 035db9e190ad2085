use proptest::prelude::*;

use super::*;
use crate::testing::{Echo, SERVER, WebClient, disturb};

fn server() -> Responder {
    Responder::new(SERVER, Box::new(Echo))
}

fn get(path: &str) -> Vec<u8> {
    format!("GET {path} HTTP/1.1\r\nHost: x\r\nX-metadata-token: t\r\nConnection: close\r\n\r\n").into_bytes()
}

#[test]
fn a_guest_asks_and_is_answered() {
    let (mut server, mut client) = (server(), WebClient::new(1000));
    let answer = client.ask(&mut server, &get("/a"));
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n") && answer.ends_with("\r\n\r\nGET /a t"), "{answer}");
    let big = client.ask(&mut server, &get("/big"));
    assert!(big.ends_with(&"b".repeat(100_000)), "{} bytes", big.len());
    // Two requests at once, and one connection for both.
    let both = [b"GET /1 HTTP/1.1\r\n\r\n".to_vec(), get("/2")].concat();
    let answer = client.ask(&mut server, &both);
    assert!(answer.contains("GET /1 none") && answer.ends_with("GET /2 t"), "{answer}");
    assert_eq!(client.ask(&mut server, b"nonsense\r\n\r\n").lines().next(), Some("HTTP/1.1 400 Bad Request"));
    let long = [b"GET / HTTP/1.1\r\nA: ".to_vec(), vec![b'a'; 5000]].concat();
    assert!(client.ask(&mut server, &long).contains("too long"));
    assert_eq!(server.delay(), None, "nothing is left to do");
}

#[test]
fn only_frames_to_its_address_are_its_own() {
    let server = server();
    let mut head = [0; HEAD_LEN];
    for (kind, at) in [([8, 6], 38), ([8, 0], 30)] {
        head[12..14].copy_from_slice(&kind);
        head[at..at + 4].copy_from_slice(&SERVER.octets());
        assert!(server.wants(&head));
        head[at] ^= 1;
        assert!(!server.wants(&head));
    }
    head[12] = 0x86;
    assert!(!server.wants(&head) && !server.wants(&head[..13]));
}

#[test]
fn clients_that_hang_make_room_for_others() {
    let (mut server, mut client) = (server(), WebClient::new(1000));
    for _ in 0..50 {
        client.ask(&mut server, b"GET /never HTTP/1.1\r\n");
    }
    assert!(client.ask(&mut server, &get("/still")).ends_with("GET /still t"));
    server.reset();
    assert!(server.frame().is_none() && server.delay().is_none());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn whatever_came_before_an_honest_guest_is_served(bytes in proptest::collection::vec(any::<u8>(), 0..4000)) {
        let mut server = server();
        disturb(&mut server, &bytes);
        // A driver that is new: as after its reset.
        server.reset();
        let answer = WebClient::new(2000).ask(&mut server, &get("/a"));
        prop_assert!(answer.ends_with("GET /a t"), "{}", answer);
    }
}
