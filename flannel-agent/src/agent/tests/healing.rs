//! The host is brought to what is wanted, whatever is done to it and whatever fails.

use super::*;

#[tokio::test(start_paused = true)]
async fn what_a_former_run_left_is_swept_after_the_first_snapshot_only() {
    let stale = HostItem::Route(crate::domain::host_state::Route {
        destination: "10.1.200.0/24".parse().unwrap(),
        via: Some("192.0.2.200".parse().unwrap()),
        device: "eth0".into(),
        onlink: false,
        source: None,
        mtu: None,
    });
    let host = FakeHost::with([stale.clone()].into_iter().collect());
    let running = Running::start("host-gw", host).await;
    running.ready().await;
    running.until("the sweep", |r| !r.host.state().contains(&stale)).await;
    assert_eq!(running.end().await, End::Stopped);
}

#[tokio::test(start_paused = true)]
async fn nothing_is_removed_while_the_peers_are_unknown() {
    let peer = HostItem::TunnelPeer(crate::domain::host_state::TunnelPeer {
        device: "flannel0".into(),
        subnet: "10.1.9.0/24".parse().unwrap(),
        node: "192.0.2.9".parse().unwrap(),
    });
    let running = {
        let host = FakeHost::with([peer.clone()].into_iter().collect());
        let running = Running::start("udp", host).await;
        // Before the loop's task runs for the first time.
        running.store.cut();
        running
    };
    tokio::time::sleep(Duration::from_secs(20)).await;
    assert!(running.host.state().contains(&peer));
    assert!(running.shown().contains("route 10.1.0.0/16 dev flannel0"), "the own part needs no peers");
    assert!(!running.health.reasons().is_empty());
    running.store.mend();
    running.until("the sweep", |r| !r.host.state().contains(&peer)).await;
    running.ready().await;
    assert_eq!(running.end().await, End::Stopped);
}

#[tokio::test(start_paused = true)]
async fn a_node_whose_store_is_late_is_ready_when_it_reaches_its_peers_and_not_before() {
    let running = {
        let host = FakeHost::new();
        host.take(Duration::from_millis(100));
        let running = Running::start("udp", host).await;
        running.peer("10.1.9.0-24", "192.0.2.9", "");
        // Before the loop's task runs for the first time.
        running.store.cut();
        running
    };
    tokio::time::sleep(Duration::from_secs(20)).await;
    assert!(running.shown().contains("route 10.1.0.0/16 dev flannel0"), "the own part needs no peers");
    running.store.mend();
    running.ready().await;
    let shown = running.shown();
    assert!(shown.contains("peer 10.1.9.0/24 at 192.0.2.9"), "ready without its peer:\n{shown}");
    assert_eq!(running.end().await, End::Stopped);
}

#[tokio::test(start_paused = true)]
async fn damage_is_repaired_from_the_wanted_state() {
    let running = Running::start("udp", FakeHost::new()).await;
    running.ready().await;
    let whole = running.host.state();
    for key in [
        Key::Link("flannel0".to_owned()),
        Key::Tunnel("flannel0".to_owned()),
        Key::Route("10.1.0.0/16".parse().unwrap()),
        Key::Address("flannel0".to_owned(), "10.1.7.0/32".parse().unwrap()),
    ] {
        running.host.lose(&key);
        running.until("the repair", |r| r.host.state() == whole).await;
    }
    assert_eq!(running.end().await, End::Stopped);
}

#[tokio::test(start_paused = true)]
async fn what_is_undone_as_soon_as_it_is_repaired_is_repaired_more_and_more_seldom() {
    let running = Running::start("udp", FakeHost::new()).await;
    running.ready().await;
    let whole = running.host.state();
    let key = Key::Route("10.1.0.0/16".parse().unwrap());
    running.host.undo(&key);
    tokio::time::sleep(Duration::from_secs(120)).await;
    let puts = running.host.log().iter().filter(|line| line.starts_with("put route 10.1.0.0/16")).count();
    let prompt = retries::PROMPT as usize;
    assert!((prompt + 3..=prompt + 12).contains(&puts), "{puts} in two minutes");
    let reasons = running.health.reasons();
    assert!(reasons.iter().any(|reason| reason.contains("undone again and again")), "{reasons:?}");
    running.host.keep(&key);
    running.ready().await;
    assert_eq!(running.host.state(), whole);
    // What has lasted is repaired at once again.
    tokio::time::sleep(Duration::from_secs(60)).await;
    running.host.lose(&key);
    let before = tokio::time::Instant::now();
    running.until("the repair", |r| r.host.state() == whole).await;
    assert!(before.elapsed() < Duration::from_millis(100), "{:?}", before.elapsed());
    assert_eq!(running.end().await, End::Stopped);
}

#[tokio::test(start_paused = true)]
async fn one_peer_that_fails_neither_stops_the_others_nor_is_hammered() {
    let running = Running::start("host-gw", FakeHost::new()).await;
    running.ready().await;
    let bad = Key::Route("10.1.9.0/24".parse().unwrap());
    running.host.refuse(bad.clone(), "network is unreachable");
    running.peer("10.1.9.0-24", "192.0.2.9", "host-gw");
    running.peer("10.1.10.0-24", "192.0.2.10", "host-gw");
    running.until("the good one", |r| r.shown().contains("route 10.1.10.0/24 via 192.0.2.10")).await;
    tokio::time::sleep(Duration::from_secs(120)).await;
    let reasons = running.health.reasons();
    assert!(reasons.iter().any(|reason| reason.contains("network is unreachable")), "{reasons:?}");
    let tries = running.host.log().iter().filter(|line| line.contains("10.1.9.0/24")).count();
    assert!((2..=15).contains(&tries), "{tries} tries in two minutes");
    running.host.allow(&bad);
    running.ready().await;
    assert!(running.shown().contains("route 10.1.9.0/24 via 192.0.2.9"));
    assert_eq!(running.end().await, End::Stopped);
}

#[tokio::test(start_paused = true)]
async fn while_the_store_is_away_the_host_is_still_healed() {
    let running = Running::start("udp", FakeHost::new()).await;
    running.peer("10.1.9.0-24", "192.0.2.9", "");
    running.until("the peer", |r| r.shown().contains("peer 10.1.9.0/24 at 192.0.2.9")).await;
    running.ready().await;
    let whole = running.host.state();
    running.store.cut();
    running.until("the news", |r| !r.health.reasons().is_empty()).await;
    running.host.lose(&Key::Link("flannel0".to_owned()));
    running.until("the repair", |r| r.host.state() == whole).await;
    running.store.mend();
    running.ready().await;
    assert_eq!(running.end().await, End::Stopped);
}

#[tokio::test(start_paused = true)]
async fn a_tunnel_that_does_not_come_up_gets_no_route_and_leaves_nothing_behind() {
    let host = FakeHost::new();
    host.refuse(Key::Tunnel("flannel0".to_owned()), "192.0.2.1:8285 is in use");
    let running = Running::start("udp", host.clone()).await;
    running.peer("10.1.9.0-24", "192.0.2.9", "");
    tokio::time::sleep(Duration::from_secs(60)).await;
    let shown = running.shown();
    assert!(!shown.contains("route") && !shown.contains("peer"), "packets would vanish:\n{shown}");
    let reasons = running.health.reasons();
    assert!(reasons.iter().any(|reason| reason.contains("8285 is in use")), "{reasons:?}");
    assert!(!running.files.path().join("subnet.env").exists());
    assert_eq!(running.end().await, End::Stopped);
    assert!(host.state().is_empty(), "left behind:\n{host}");
}

#[tokio::test(start_paused = true)]
async fn what_failed_while_the_interface_was_gone_is_tried_at_once_when_it_is_back() {
    let running = Running::start("udp", FakeHost::new()).await;
    running.ready().await;
    let key = Key::Tunnel("flannel0".to_owned());
    running.host.refuse(key.clone(), "there is no network device eth0");
    running.host.rewire(|facts| facts.interfaces.clear());
    running.host.lose(&key);
    tokio::time::sleep(Duration::from_secs(300)).await;
    running.host.allow(&key);
    running.host.rewire(|facts| *facts = uplink(1500, &["192.0.2.1"]));
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(running.health.reasons().is_empty(), "{:?}", running.health.reasons());
    assert_eq!(running.end().await, End::Stopped);
}
