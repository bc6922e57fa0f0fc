//! What is ours and what is not: nothing of others is seen, swept or replaced, except what is taken over.

use super::*;

pub(crate) async fn foreign() -> Outcome {
    underlay();
    ip("tuntap add mode tun name foreign0");
    ip("addr add 10.5.77.1/24 dev foreign0");
    ip("link set foreign0 up");
    // Like ours in all but the protocol, the shape, the table, the metric or the place.
    let foreign = [
        "10.5.9.0/24 via 10.9.0.2 dev under0",
        "10.5.10.0/24 via 10.9.0.2 dev under0 proto static",
        "blackhole 10.5.11.0/24 proto 85",
        "10.5.12.0/24 via 10.9.0.2 dev under0 proto 85 table 100",
        "10.5.13.0/24 via 10.9.0.2 dev under0 proto 85 metric 5",
        "192.0.2.0/24 via 10.9.0.2 dev under0 proto 85",
        "fd00:5:9::/64 via fd00:9::2 dev under0",
    ];
    for route in foreign {
        ip(&format!("route add {route}"));
    }
    settled().await;
    let before = [ip("route show table all"), ip("-6 route show table all"), ip("-o addr"), ip("-o link")];
    let mut host = host()?;
    assert_eq!(host.observe().await?, HostState::new());
    // Even when told to remove their destinations, only ours would go.
    let removals = ["10.5.9.0/24", "10.5.10.0/24", "10.5.11.0/24", "10.5.12.0/24"]
        .map(|destination| Change::Remove(route(destination, "10.9.0.2")));
    // (10.5.11.0/24 has our protocol and is asked for by destination: it is the one that may go.)
    let [a, b, _, d] = removals;
    for result in host.apply(&[a, b, d, Change::Remove(route("fd00:5:9::/64", "fd00:9::2"))]).await {
        assert_eq!(result, Ok(()));
    }
    let after = [ip("route show table all"), ip("-6 route show table all"), ip("-o addr"), ip("-o link")];
    assert_eq!(before, after);
    Ok(())
}

pub(crate) async fn sweep() -> Outcome {
    underlay();
    for route in [
        "10.5.7.0/24 via 10.9.0.2 dev under0 proto 85",
        "10.5.9.0/24 via 10.9.0.9 dev under0 proto 85",
        "192.0.2.0/24 via 10.9.0.2 dev under0 proto 85",
        "10.0.0.0/8 via 10.9.0.2 dev under0 proto 85",
        "10.5.6.0/24 via 10.9.0.2 dev under0 proto static",
    ] {
        ip(&format!("route add {route}"));
    }
    let mut host = host()?;
    let found = host.observe().await?;
    assert_eq!(found, state([route("10.5.7.0/24", "10.9.0.2"), route("10.5.9.0/24", "10.9.0.9")]));
    let wanted = state([route("10.5.9.0/24", "10.9.0.2")]);
    go(&mut host, &found, &wanted).await;
    assert_eq!(host.observe().await?, wanted);
    let left = ip("route show table main");
    for stays in ["192.0.2.0/24", "10.0.0.0/8", "10.5.6.0/24", "10.5.9.0/24 via 10.9.0.2"] {
        assert!(left.contains(stays), "{stays} is not in:\n{left}");
    }
    assert!(!left.contains("10.5.7.0/24"), "{left}");
    Ok(())
}

pub(crate) async fn takeover() -> Outcome {
    underlay();
    ip("route add 10.5.9.0/24 via 10.9.0.2 dev under0");
    ip("route add 10.5.8.0/24 via 10.9.0.7 dev under0");
    ip("route add fd00:5:9::/64 via fd00:9::2 dev under0");
    let mut host = host()?;
    assert_eq!(host.observe().await?, HostState::new(), "they are not ours yet");
    let monitor = Monitor::start();
    let wanted = state([
        route("10.5.9.0/24", "10.9.0.2"),
        route("10.5.8.0/24", "10.9.0.8"),
        route("fd00:5:9::/64", "fd00:9::2"),
    ]);
    go(&mut host, &HostState::new(), &wanted).await;
    let news = monitor.lines();
    assert!(!news.iter().any(|line| line.contains("Deleted")), "{news:?}");
    assert_eq!(host.observe().await?, wanted);
    for destination in ["10.5.9.0/24", "10.5.8.0/24", "fd00:5:9::/64"] {
        let family = if destination.contains(':') { "-6" } else { "-4" };
        let routes = ip(&format!("{family} route show {destination} table main"));
        assert_eq!(routes.lines().count(), 1, "{routes}");
        assert!(routes.contains("proto 85"), "{routes}");
    }
    Ok(())
}

pub(crate) async fn connected() -> Outcome {
    underlay();
    ip("addr add 10.5.20.1/24 dev under0");
    let mut host = host()?;
    go(&mut host, &HostState::new(), &state([tun()])).await;
    let before = ip("route show 10.5.20.0/24");
    let changes = [
        Change::Put(HostItem::Route(plain("10.5.20.0/24", None, "flannel0"))),
        Change::Put(HostItem::Route(plain("10.5.21.0/24", None, "flannel0"))),
    ];
    let results = host.apply(&changes).await;
    assert_eq!(
        results[0].as_ref().unwrap_err().to_string(),
        "put route 10.5.20.0/24 dev flannel0: 10.5.20.0/24 is the network of an address on under0, whose route stays"
    );
    assert_eq!(results[1], Ok(()));
    assert_eq!(ip("route show 10.5.20.0/24"), before);
    // On a device of ours it may be replaced: what is on it is ours.
    ip("addr add 10.5.30.1/24 dev flannel0");
    let ours = HostItem::Route(plain("10.5.30.0/24", None, "flannel0"));
    assert_eq!(host.apply(&[Change::Put(ours)]).await, [Ok(())]);
    Ok(())
}

pub(crate) async fn foreign_device() -> Outcome {
    ip("link add flannel0 type bridge");
    let mut host = host()?;
    assert_eq!(host.observe().await?, HostState::new());
    let results = host.apply(&[Change::Remove(tun())]).await;
    assert_eq!(
        results[0].as_ref().unwrap_err().to_string(),
        "remove link flannel0 type tun mtu 1472: flannel0 is of kind bridge now, so it is not ours"
    );
    assert!(ip("-o link").contains("flannel0"));
    Ok(())
}
