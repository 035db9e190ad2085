//! The guest's metadata: written through the API, read by the guest over its network interface.

use std::fs;

use anyhow::{Result, ensure};
use bedplate_tests::inside::guest::{Guest, GuestSpec};
use bedplate_tests::inside::tools::{remove_tap, tap};
use serde_json::{Value, json};

pub fn version_1() -> Result<()> {
    on_tap("tap-m", json!({"network_interfaces": ["eth0"]}), anybody)
}

pub fn version_2() -> Result<()> {
    let mmds = json!({"network_interfaces": ["eth0"], "version": "V2", "ipv4_address": "169.254.1.2"});
    on_tap("tap-n", mmds, with_token)
}

fn on_tap(name: &str, mmds: Value, scenario: fn(&Guest) -> Result<()>) -> Result<()> {
    tap(name, Some("10.7.0.1/24"))?;
    let result = boot(name, mmds).and_then(|guest| scenario(&guest));
    remove_tap(name)?;
    result
}

fn boot(tap: &str, mmds: Value) -> Result<Guest> {
    let file = format!("/run/{tap}.json");
    fs::write(&file, r#"{"latest": {"meta-data": {"id": "i-1", "zone": "a"}}}"#)?;
    let guest = GuestSpec::new(tap).network(tap, "02:00:00:00:07:02").cmdline("tiny.ip=10.7.0.2/24");
    let guest = guest.section("mmds-config", mmds).options(&["--metadata", &file, "--mmds-size-limit", "95000"]);
    // The largest document goes through the API, too.
    let guest = guest.options(&["--http-api-max-payload-size", "100000"]).boot()?;
    guest.run("ip route add 169.254.0.0/16 dev eth0")?;
    Ok(guest)
}

fn anybody(guest: &Guest) -> Result<()> {
    let at = "http://169.254.169.254/latest/meta-data";
    ensure!(guest.run(&format!("wget -q -O - {at}"))? == "id\nzone");
    ensure!(guest.run(&format!("wget -q -O - {at}/id"))? == "i-1");
    let json = guest.run(&format!("wget -q --header 'Accept: application/json' -O - {at}"))?;
    ensure!(json == r#"{"id":"i-1","zone":"a"}"#, "as JSON: {json}");
    ensure!(guest.try_run(&format!("wget -q -O - {at}/nothing"))?.1 != "0", "what is not there was found");
    // A change is seen at once.
    guest.api("PATCH", "/mmds", r#"{"latest": {"meta-data": {"id": "i-2", "zone": null}}}"#, 204)?;
    ensure!(guest.run(&format!("wget -q -O - {at}"))? == "id");
    ensure!(guest.run(&format!("wget -q -O - {at}/id"))? == "i-2");
    ensure!(guest.api("GET", "/mmds", "", 200)? == r#"{"latest":{"meta-data":{"id":"i-2"}}}"#);
    // Many frames, one after the other and side by side.
    guest.api("PUT", "/mmds", &json!({"big": "0123456789".repeat(9000)}).to_string(), 204)?;
    let fetch = "wget -q -O - http://169.254.169.254/big | wc -c";
    ensure!(guest.run(fetch)? == "90000", "a large document is not whole");
    let sizes = guest.run(&format!("for i in 1 2 3 4 5 6; do ({fetch}) & done; wait"))?;
    ensure!(sizes.lines().filter(|line| *line == "90000").count() == 6, "side by side: {sizes}");
    ensure!(
        guest
            .api("PUT", "/mmds", &json!({"big": "x".repeat(99_000)}).to_string(), 413)?
            .contains("MMDS limit exceeded")
    );
    // The rest of the network is there as ever.
    guest.run("ping -c 1 -W 10 10.7.0.1 > /dev/null")?;
    Ok(())
}

fn with_token(guest: &Guest) -> Result<()> {
    let at = "169.254.1.2";
    ensure!(guest.try_run(&format!("wget -q -O - http://{at}/latest"))?.1 != "0", "answered without a token");
    let ask = |request: &str| format!("printf '{request}' | nc {at} 80");
    let head = "HTTP/1.1\\r\\nConnection: close\\r\\nX-metadata-token-ttl-seconds: 60\\r\\n\\r\\n";
    let answer = guest.run(&ask(&format!("PUT /latest/api/token {head}")))?;
    let token = answer.lines().last().unwrap_or_default();
    ensure!(answer.contains("200 OK") && token.len() > 40, "the token is {answer:?}");
    for header in ["X-metadata-token", "X-aws-ec2-metadata-token"] {
        let id = guest.run(&format!("wget -q --header '{header}: {token}' -O - http://{at}/latest/meta-data/id"))?;
        ensure!(id == "i-1", "with {header}: {id}");
    }
    let wrong = guest.run(&ask("GET /latest HTTP/1.1\\r\\nConnection: close\\r\\nX-metadata-token: x\\r\\n\\r\\n"))?;
    ensure!(wrong.contains("401") && wrong.contains("not valid"), "a wrong token: {wrong}");
    Ok(())
}
