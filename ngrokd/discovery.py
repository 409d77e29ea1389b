"""Poll, plan, apply, publish: how what ngrok knows becomes true on this machine.

Theory of operation
-------------------
One task, `Discovery.run`, goes round and round: make sure there is an identity (register, renew), list the bound
endpoints, let `names.reconcile.plan` decide what should be, apply the difference. Everything it learns stands in
`Knowledge`, which others read and nobody else writes.

The order of applying never shows a name whose path does not work:

    adding     save the addresses, publish to the data plane, write the hosts file
    removing   write the hosts file, publish to the data plane
    both       save, publish old and new together, write the hosts file, publish the new

What it refuses to do: give up. Every expected error (`ApiError`, a file that cannot be written) leaves what was last
good in place, is written down where `status` shows it, and is tried again. Only a defect of ours gets out of `run`.

Between two polls it looks at the hosts file every other second, which is one `stat`, and puts our names back when
somebody has edited it; whoever edits it again and again is answered ever more slowly.

Deciding is fast but not free: 65,000 endpoints take a good part of a second. So the pure parts run where `run_sync`
runs them, which is a thread in the daemon and nothing at all under a simulated clock, and a listing that is the same
as the last is not looked at again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Any, Final, Protocol

import msgspec
import trio

from ngrokd import files
from ngrokd.cloud.api import KeyRefusedError, NgrokApi, Operator, OperatorGoneError, trouble_of
from ngrokd.cloud.backoff import Backoff, Trouble
from ngrokd.cloud.identity import (
    IdentityStore,
    Step,
    StoredIdentity,
    credentials_of,
    new_key_and_csr,
    next_step,
)
from ngrokd.config import Settings
from ngrokd.endpoints import Credentials, Endpoint
from ngrokd.errors import ApiError, NgrokdError, StateError
from ngrokd.host.hostsfile import HostsFileError, edit_hosts, fingerprint, read_hosts, remove_stale_hosts
from ngrokd.names import hosts, reconcile
from ngrokd.names.addresses import AddressPool
from ngrokd.names.directory import Directory
from ngrokd.names.hosts import HostsRefused
from ngrokd.names.reconcile import Desired, LastKnown, Plan
from ngrokd.names.twins import Twins
from ngrokd.ops.events import Events

log = logging.getLogger("ngrokd.discovery")

MAPPINGS: Final = "ip_mappings.json"
ADDRESSES: Final = "addresses.json"
ENDPOINTS: Final = "endpoints.json"
# Whose temporary files a killed run may have left; the identity's are the identity store's affair.
STATE_FILES: Final = (MAPPINGS, ADDRESSES, ENDPOINTS, "api_key", "ingress-ca.pem", "subnet6")
# 65,000 endpoints are 10 MB; what is larger was not written by us.
MAX_STATE_BYTES: Final = 128 << 20
# An answer that takes everything away is asked for again this soon before it is believed.
CONFIRM_S: Final = 5.0
# A file that could not be written (full disk, read-only for a moment) is tried again this often.
RETRY_S: Final = 30.0
# How often the hosts file is looked at between two polls.
HOSTS_LOOK_S: Final = 2.0
HOSTS_LOOK_SLOWLY_S: Final = 60.0
HOSTS_TRIES: Final = 3
# Of endpoints that come, go or are skipped in one poll, so many get a line each: 65,000 would be a second of logging.
ENDPOINTS_TOLD: Final = 50


class RunSync(Protocol):
    """Runs a function that takes its time, and gives its result: in a thread, or right here."""

    async def __call__(self, function: Callable[..., Any], /, *args: Any) -> Any:  # Any: it passes through
        """Run `function(*args)`."""
        ...


@dataclass(slots=True)
class Knowledge:
    """What the daemon knows of ngrok, for `status`, health and the ready line. Times are wall clock, 0 is never.

    Attributes:
        waiting_for_key: there is no API key to work with.
        operator_id: ours, "" before registration.
        ingress_endpoint: HOST:PORT as the API gave it, "" when it gave none.
        credentials: the client certificate in use.
        desired: what is served (and named, unless `hosts_problem`).
        polled_at: when a poll last succeeded.
        tried_at: when the API was last asked.
        problem: what the API (or the state directory) last refused, "" when all is well; `remedy` goes with it.
        auth_failed: the API does not accept the key.
        hosts_problem: why the names are not in the hosts file, "" when they are.
        state_problem: why something could not be saved in the state directory, "" when all is saved.
        renewal_problem: why the certificate could not be renewed, "" when it could or need not.
        from_last_known: what is served was read from disk and not yet confirmed.
        poll_results: how many rounds of asking ended "ok", "failed" (which may pass) and "refused".
    """

    waiting_for_key: bool = False
    operator_id: str = ""
    ingress_endpoint: str = ""
    credentials: Credentials | None = None
    desired: Desired = field(default_factory=Desired)
    polled_at: float = 0.0
    tried_at: float = 0.0
    problem: str = ""
    remedy: str = ""
    auth_failed: bool = False
    hosts_problem: str = ""
    state_problem: str = ""
    renewal_problem: str = ""
    selectors_problem: str = ""
    from_last_known: bool = False
    polls: int = 0
    failures: int = 0
    poll_results: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("ok", "failed", "refused"), 0))


class Discovery:
    """The loop. Give it what it needs and `run` it.

    Args:
        settings: the configuration; see `configure`.
        api: the client of ngrok's API.
        store: the identity on disk.
        has_key: whether there is an API key now.
        publish: tells the data plane what to serve; when it returns, that is served.
        use: tells the data plane which certificate to present.
        reach: called when the API names an ingress endpoint.
        wall: the wall clock.
        run_sync: see `RunSync`.
        machine_names: what this machine calls itself.
        twins: the names' IPv6 addresses, None when they have none.
        rng: for jitter.
        events: told what happens.

    Attributes:
        name_twins: whether the hosts file shall hold IPv6 lines; see `name_over_ipv6`.
        first_attempt: the API was asked once, well or not.
        first_success: it answered, and what it lists is served and named.
        ingress_settled: what the API says of the ingress is known, or cannot be had for now.
    """

    def __init__(
        self,
        settings: Settings,
        api: NgrokApi,
        store: IdentityStore,
        *,
        has_key: Callable[[], bool],
        publish: Callable[[Directory], Awaitable[None]],
        use: Callable[[Credentials], None],
        reach: Callable[[str], None],
        wall: Callable[[], float],
        run_sync: RunSync,
        machine_names: Sequence[str] = (),
        twins: Twins | None = None,
        rng: random.Random | None = None,
        events: Events | None = None,
    ) -> None:
        self.settings = settings
        self.known = Knowledge()
        self._api = api
        self._store = store
        self._has_key = has_key
        self._publish = publish
        self._use = use
        self._reach = reach
        self._wall = wall
        self._run_sync = run_sync
        self._machine_names = tuple(machine_names)
        self._twins = twins
        self.name_twins = False
        self._named_twins = False
        self._naming = trio.Lock()
        self._backoff = Backoff()
        self._rng = rng or random.Random()
        self._events = events if events is not None else Events(wall)
        self._identity = StoredIdentity()
        self._pool: AddressPool
        self._listing = b""  # the mark of the last one that was applied
        self._saved_generation = -1
        self._endpoints_saved = False
        self._unsaved: dict[str, str] = {}  # file -> why
        self._hosts_print: tuple[int, ...] | None = None  # None: nothing of ours was written yet
        self._hosts_retry_at = math.inf
        self._confirming = False
        self._force_renewal = False
        self._ingress_known = False
        self._tell_selectors = False
        self._asking = False
        self._rounds = 0
        self._wanted = trio.Event()
        self._round_over = trio.Event()
        self.first_attempt = trio.Event()
        self.first_success = trio.Event()
        self.ingress_settled = trio.Event()

    # What others ask for

    def poke(self) -> None:
        """Ask the API now, whatever the timer says. A new API key, `refresh` and a wake from sleep end here."""
        self._backoff.reset()
        self._wanted.set()

    async def ask_now(self) -> None:
        """Ask the API now and wait until that is over, well or not. Cancelled, the asking goes on."""
        # What is under way may have begun before the caller's change.
        wanted = self._rounds + (2 if self._asking else 1)
        self.poke()
        while self._rounds < wanted:
            await self._round_over.wait()

    async def next_round(self) -> None:
        """Wait until the API was asked the next time, well or not."""
        await self._round_over.wait()

    async def name_over_ipv6(self, wanted: bool) -> None:
        """Let the hosts file hold IPv6 lines from now on, or not: only while that way is open.

        It is done when this returns, whatever else is going on, unless nothing was written yet or the file refuses.
        """
        if self.name_twins is not wanted:
            self.name_twins = wanted
            if self._hosts_print is not None:
                await self._name()

    def refresh_certificate(self, *, force: bool) -> None:
        """Look at the certificate now; renew it when it is due, or in any case."""
        self._force_renewal = self._force_renewal or force
        self.poke()

    async def configure(self, settings: Settings) -> None:
        """Go on with another configuration, of which no key differs that is for the next start.

        Our names have moved to another hosts file when this returns, or are out of it, or in it.
        """
        before = self.settings
        self._listing = b""  # of the same endpoints others may be served now
        if before.api.selectors != settings.api.selectors:
            self._tell_selectors = True
        if before.hosts == settings.hosts:
            self.settings = settings
        else:
            async with self._naming:
                self.settings = settings
                if before.hosts.enabled and self._hosts_print is not None:
                    await self._run_sync(self._withdraw_from, before.hosts.path)
                self._hosts_print = None
                self.known.hosts_problem = ""
            if self.known.polled_at or self.known.from_last_known:
                await self._name()
        self.poke()

    # Start

    async def restore(self) -> None:
        """Take over what the state directory holds: addresses, identity, and the last known endpoints.

        Never fails for damaged files: what cannot be read is logged and made anew.
        """
        directory = self.settings.state.directory
        files.remove_stale(directory, STATE_FILES)
        if self.settings.hosts.enabled:
            remove_stale_hosts(self.settings.hosts.path)
        self._pool = await self._run_sync(self._load_pool)
        for problem in self._pool.problems:
            log.warning("%s", problem)
        stored = self._store.load()
        try:
            self._adopt(stored)
        except NgrokdError as error:
            log.warning("%s", error)
            self._adopt(replace(stored, credentials=None, notes=()))
        last: LastKnown = await self._run_sync(self._load_endpoints)
        if last.problem:
            log.warning("%s", last.problem)
        self.known.ingress_endpoint = last.ingress_endpoint
        if last.listing:
            self.ingress_settled.set()
            self.known.from_last_known = True
            log.info("serving the %d endpoints last known in %s until the API answers", len(last.listing), directory)
            await self._apply(await self._run_sync(self._plan, list(last.listing), True))

    def _load_pool(self) -> AddressPool:
        return AddressPool.load(self.settings.net.subnet, self._read(MAPPINGS), self._read(ADDRESSES))

    def _load_endpoints(self) -> LastKnown:
        return reconcile.load_endpoints(self._read(ENDPOINTS))

    def _read(self, name: str) -> bytes | None:
        path = os.path.join(self.settings.state.directory, name)
        try:
            return files.read_limited(path, MAX_STATE_BYTES)
        except FileNotFoundError:
            return None
        except StateError as error:
            log.warning("%s; going on without it", error)
            return None

    def _adopt(self, identity: StoredIdentity) -> None:
        """Be this operator from now on. Raises NgrokdError, having changed nothing, when its certificate is no use."""
        for note in identity.notes:
            log.warning("%s", note)
        if identity.credentials is not None:
            self._use(identity.credentials)
            self.known.credentials = identity.credentials
        self._identity = identity
        self.known.operator_id = identity.operator_id

    # The loop

    async def run(self) -> None:
        """Poll until cancelled. `restore` comes first."""
        while True:
            self._wanted = trio.Event()
            self._asking = True
            delay = await self._round()
            self._asking = False
            self._rounds += 1
            if self.known.tried_at:
                self.first_attempt.set()
                self.ingress_settled.set()
            if self.known.polled_at:
                self.first_success.set()
            self._round_over.set()
            self._round_over = trio.Event()
            await self._rest(delay)

    async def _rest(self, delay_s: float) -> None:
        """Wait for the next round, and keep our names in the hosts file meanwhile."""
        look_s = HOSTS_LOOK_S
        with trio.move_on_after(delay_s):
            while not self._wanted.is_set():
                with trio.move_on_after(look_s):
                    await self._wanted.wait()
                if self._hosts_need_us():
                    look_s = min(look_s * 2, HOSTS_LOOK_SLOWLY_S)
                    await self._name()
                    self._listing = b""  # what others wrote may change what may be served; the next poll judges

    async def _round(self) -> float:
        """One poll. Returns how long to wait before the next, in seconds."""
        known = self.known
        if not self._has_key():
            if not known.waiting_for_key:
                self._events.emit("api.key_missing", "there is no API key yet; set one with: sudo ngrokd set-api-key")
            known.waiting_for_key = True
            return math.inf
        known.waiting_for_key = False
        known.tried_at = self._wall()
        known.polls += 1
        started = trio.current_time()
        try:
            await self._ensure_identity()
            await self._look_at_operator()
            await self._select()
            listing = await self._api.bound_endpoints(known.operator_id)
        except (ApiError, StateError) as error:
            return self._failed(error, trio.current_time() - started)
        self._backoff.reset()
        known.poll_results["ok"] += 1
        if known.problem:
            self._events.emit("api.recovered", "the API answers again")
        known.problem = known.remedy = ""
        known.auth_failed = False
        return await self._take(listing)

    def _failed(self, error: ApiError | StateError, took_s: float) -> float:
        """Write down what went wrong. Returns how long to wait, in seconds."""
        known = self.known
        known.failures += 1
        known.auth_failed = isinstance(error, KeyRefusedError)
        trouble = trouble_of(error) if isinstance(error, ApiError) else Trouble.PASSING
        known.poll_results["refused" if trouble is Trouble.REFUSED else "failed"] += 1
        if str(error) != known.problem:
            text = f"{error}; {error.remedy}" if error.remedy else str(error)
            self._events.emit("api.failed", text, reason=str(error))
        known.problem, known.remedy = str(error), error.remedy
        if isinstance(error, OperatorGoneError) and known.operator_id:
            # The operator was deleted at ngrok. The next round registers another one; addresses and names stay. That
            # round waits as after any failure: an API that denies each new operator must not get one every second.
            text = f"operator {known.operator_id} is gone at ngrok; registering again"
            self._events.emit("operator.gone", text, operator=known.operator_id)
            self._identity = replace(self._identity, operator_id="")
            known.operator_id = ""
        return self._backoff.next_delay(
            trio.current_time(),
            self._rng,
            trouble=trouble,
            retry_after_s=error.retry_after_s if isinstance(error, ApiError) else None,
            took_s=took_s,
        )

    # Identity

    async def _ensure_identity(self) -> None:
        """Register or renew where that is due.

        A renewal that fails is not fatal while the old certificate holds: the endpoints are listed all the same.
        """
        known = self.known
        decision = next_step(self._identity, self._wall(), force=self._force_renewal)
        if decision.step is Step.USE:
            return
        if not known.renewal_problem:
            log.info("%s", decision.reason)
        try:
            operator = await self._obtain(decision.step)
        except (KeyRefusedError, OperatorGoneError):
            raise
        except (ApiError, StateError) as error:
            if decision.step is Step.REGISTER or not decision.usable:
                raise
            if str(error) != known.renewal_problem:
                text = f"the certificate could not be renewed: {error}"
                self._events.emit("certificate.failed", text, reason=str(error))
            known.renewal_problem = str(error)
            return
        self._force_renewal = False
        known.renewal_problem = ""
        self._learn_ingress(operator)

    async def _obtain(self, step: Step) -> Operator:
        """Get a certificate for a new key from ngrok, save both and use them. Raises ApiError, StateError."""
        self._store.check_writable()
        key_pem, csr_pem = await self._run_sync(new_key_and_csr)
        if step is Step.REGISTER:
            operator = await self._api.register(csr_pem, self.settings.api.selectors)
        else:
            operator = await self._api.renew(self._identity.operator_id, csr_pem)
        try:
            credentials = credentials_of(key_pem, operator.certificate_pem)
            with trio.CancelScope(shield=True):  # what ngrok has made for us must not be forgotten at a shutdown
                await self._run_sync(self._store.save, operator.id, credentials)
            self._adopt(StoredIdentity(operator.id, credentials))
        except NgrokdError as error:
            if step is Step.REGISTER:
                await self._take_back(operator.id)
            if isinstance(error, StateError):
                raise
            raise ApiError(f"ngrok's answer holds no certificate that fits our key: {error}") from error
        day = _day(credentials.not_after)
        text = f"operator {operator.id}, certificate valid until {day}"
        self._events.emit("operator.registered", text, operator=operator.id, not_after=day)
        return operator

    async def _select(self) -> None:
        """Tell ngrok of other selectors. One that refuses them goes on listing what it listed before."""
        if not self._tell_selectors:
            return
        selectors = self.settings.api.selectors
        try:
            await self._api.select(self.known.operator_id, selectors)
        except (KeyRefusedError, OperatorGoneError):
            raise
        except ApiError as error:
            if str(error) != self.known.selectors_problem:
                log.warning("%s%s", error, f"; {error.remedy}" if error.remedy else "")
            self.known.selectors_problem = str(error)
            return
        self.known.selectors_problem = ""
        if selectors == self.settings.api.selectors:
            self._tell_selectors = False
        log.info("ngrok was told the selectors: %s", ", ".join(selectors))

    async def _look_at_operator(self) -> None:
        """Once per start: ask where the ingress is, which registering and renewing would have told."""
        if not self._ingress_known:
            operator = await self._api.get_operator(self.known.operator_id)
            self._learn_ingress(operator)
            wanted = self.settings.api.selectors
            # Those of an operator of the Go daemon's, which sends none, are left alone unless others are asked for.
            if "api.selectors" in self.settings.origins and operator.selectors not in ((), wanted):
                self._tell_selectors = True

    def _learn_ingress(self, operator: Operator) -> None:
        self._ingress_known = True
        if operator.ingress_endpoint and operator.ingress_endpoint != self.known.ingress_endpoint:
            self.known.ingress_endpoint = operator.ingress_endpoint
            self._endpoints_saved = False  # it stands in the same file
            self._reach(operator.ingress_endpoint)
        self.ingress_settled.set()

    async def _take_back(self, operator_id: str) -> None:
        """An operator that nobody remembers would stay at ngrok for ever."""
        try:
            await self._api.delete_operator(operator_id)
        except ApiError as error:
            log.warning(
                "operator %s was registered, could not be saved and could not be deleted: %s", operator_id, error
            )

    # Endpoints

    async def _take(self, listing: list[object]) -> float:
        known = self.known
        interval = self.settings.api.poll_interval_s
        mark = await self._run_sync(mark_of, listing)
        if not mark or mark != self._listing or self._confirming or not await self._run_sync(self._undisturbed):
            plan = await self._run_sync(self._plan, listing, self._confirming)
            if plan.confirm:
                log.warning("the API lists no endpoints any more; asking again before they go")
                self._confirming = True
                return min(CONFIRM_S, interval)
            self._confirming = False
            await self._apply(plan)
            self._listing = mark
        known.polled_at = self._wall()
        known.from_last_known = False
        return min(interval, RETRY_S) if known.state_problem else interval

    def _undisturbed(self) -> bool:
        """Whether the same listing would lead to the same state: nobody touched the hosts file, nothing is owed."""
        known = self.known
        if known.hosts_problem or self._unsaved or not self._endpoints_saved or known.desired.without_address:
            return False
        hosts_file = self.settings.hosts
        if not hosts_file.enabled:
            return True
        return self.name_twins is self._named_twins and fingerprint(hosts_file.path) == self._hosts_print

    def _plan(self, listing: list[object], confirmed: bool = False) -> Plan:
        settings = self.settings
        survey = None
        if settings.hosts.enabled:
            try:
                text = read_hosts(settings.hosts.path)
            except HostsFileError as error:
                log.warning("%s", error)
            else:
                survey = hosts.survey(text, settings.net.interface, subnet=self._subnets())
        refused = reconcile.denied(
            machine=self._machine_names,
            servers=_servers(settings, self.known.ingress_endpoint),
            hosts=survey,
            instance=settings.net.interface,
        )
        return reconcile.plan(
            self.known.desired,
            listing,
            self._pool,
            refused,
            self._wall(),
            confirmed=confirmed,
            limit=settings.limits.endpoints,
        )

    async def _apply(self, plan: Plan) -> None:
        """Make the plan true, in the order of the module's theory.

        Orders to the data plane are given here, on the loop; files are written where `run_sync` runs.
        """
        known, before, after = self.known, self.known.desired, plan.desired
        self._tell_changes(plan)
        if after.without_address and after.without_address != before.without_address:
            log.error("%s", self._pool.shortage())
        await self._run_sync(self._save_addresses)
        published = before.directory
        if plan.added or plan.changed:
            published = await self._run_sync(plan.transition)
            await self._publish(published)
        known.desired = after.with_flags(known.desired.flags)  # some may have been found since the plan was made
        await self._name()
        if published is not after.directory:
            await self._publish(after.directory)
        if plan or known.from_last_known or not self._endpoints_saved:
            await self._run_sync(self._save_endpoints)

    def _tell_changes(self, plan: Plan) -> None:
        """An event for the whole, and one for each, of so many as somebody may want to read."""
        emit = self._events.emit
        if plan:
            emit(
                "endpoints.changed",
                f"endpoints: {plan.summary()}",
                added=len(plan.added),
                removed=len(plan.removed),
                changed=len(plan.changed),
                skipped=len(plan.skipped),
                served=len(plan.desired.services),
            )
        for service in plan.added[:ENDPOINTS_TOLD]:
            endpoint = service.endpoint
            text = f"served: {endpoint.url} at {service.address}"
            emit("endpoint.added", text, endpoint=_door(endpoint), address=str(service.address))
        for service in plan.removed[:ENDPOINTS_TOLD]:
            emit("endpoint.removed", f"not served any more: {service.endpoint.url}", endpoint=_door(service.endpoint))
        for skipped in plan.skipped[:ENDPOINTS_TOLD]:
            text = f"not served: {skipped.id} {skipped.url}: {skipped.reason}"
            emit("endpoint.skipped", text, endpoint=skipped.url, id=skipped.id, reason=skipped.reason)
        if len(plan.skipped) > ENDPOINTS_TOLD:
            log.warning("not served: %d more; status lists them all", len(plan.skipped) - ENDPOINTS_TOLD)

    def _save_addresses(self) -> None:
        if self._pool.generation != self._saved_generation:
            saved = self._save(MAPPINGS, self._pool.dump_json, mode=0o644)
            if self._save(ADDRESSES, self._pool.dump_state_json) and saved:
                self._saved_generation = self._pool.generation

    def _save_endpoints(self) -> None:
        known = self.known
        self._endpoints_saved = self._save(
            ENDPOINTS, lambda: reconcile.dump_endpoints(known.desired, self._wall(), known.ingress_endpoint)
        )

    def _save(self, name: str, dump: Callable[[], bytes], mode: int = 0o600) -> bool:
        path = os.path.join(self.settings.state.directory, name)
        try:
            files.atomic_write(path, dump(), mode)
        except StateError as error:
            # In memory everything is right; the next poll tries again.
            if self._unsaved.get(name) != str(error):
                log.error("%s%s", error, f"; {error.remedy}" if error.remedy else "")
            self._unsaved[name] = str(error)
        else:
            self._unsaved.pop(name, None)
        self.known.state_problem = next(iter(self._unsaved.values()), "")
        return name not in self._unsaved

    # The hosts file

    def _hosts_need_us(self) -> bool:
        """Whether somebody edited the file since we wrote it, or it is time to try again what failed."""
        if self.known.hosts_problem:
            return trio.current_time() >= self._hosts_retry_at
        if not self.settings.hosts.enabled or self._hosts_print is None:
            return False
        if self.name_twins is not self._named_twins:
            return True
        return fingerprint(self.settings.hosts.path) != self._hosts_print

    async def _name(self) -> None:
        """Make the hosts file say what is desired: whatever is by then, for several may want to."""
        async with self._naming:
            await self._run_sync(self._write_hosts)
            self._hosts_retry_at = trio.current_time() + RETRY_S

    def _write_hosts(self) -> None:
        settings, known = self.settings, self.known
        if not settings.hosts.enabled:
            return
        lines = known.desired.hosts_entries()
        entries: list[tuple[IPv4Address | IPv6Address, str]] = [*lines]
        self._named_twins = self.name_twins
        if self._twins is not None and self._named_twins:
            of = self._twins.of
            entries += [(of(address), host) for address, host in lines]
        try:
            # Remembered is the mark of a file that was then read and found right, so that no edit of others, however
            # soon after ours, is taken for our own.
            for _ in range(HOSTS_TRIES):
                mark = fingerprint(settings.hosts.path)
                if not edit_hosts(settings.hosts.path, lambda text: self._rendered(text, entries)):
                    break
            self._hosts_print = mark
        except (HostsFileError, HostsRefused) as error:
            if str(error) != known.hosts_problem:
                text = f"{error}; {error.remedy}" if error.remedy else str(error)
                self._events.emit("hosts.failed", text, reason=str(error))
            known.hosts_problem = str(error)
        else:
            known.hosts_problem = ""

    def _rendered(self, text: bytes, entries: Sequence[tuple[Any, str]]) -> bytes:
        return hosts.render(text, entries, self.settings.net.interface, subnet=self._subnets())

    def _subnets(self) -> tuple[IPv4Network | IPv6Network, ...]:
        subnet = IPv4Network(self.settings.net.subnet)
        return (subnet,) if self._twins is None else (subnet, self._twins.subnet6)

    def withdraw(self) -> None:
        """Take our names out of the hosts file: the first act of stopping, the last of a start that failed."""
        if self.settings.hosts.enabled:
            self._withdraw_from(self.settings.hosts.path)

    def _withdraw_from(self, path: str) -> None:
        try:
            edit_hosts(path, lambda text: self._rendered(text, ()))
        except HostsFileError as error:
            log.error("the names stay in the hosts file: %s%s", error, f"; {error.remedy}" if error.remedy else "")


def _day(wall: float) -> str:
    return f"{datetime.fromtimestamp(wall, UTC):%Y-%m-%d %H:%M} UTC"


def _servers(settings: Settings, ingress_endpoint: str) -> list[str]:
    """Host names that the daemon itself must reach, and so must not take over."""
    url = settings.api.url.partition("://")[2]
    return [_host(text) for text in (url, settings.ingress.address, ingress_endpoint) if text]


def _door(endpoint: Endpoint) -> str:
    return f"{endpoint.host}:{endpoint.port}"


def _host(address: str) -> str:
    return address.rpartition(":")[0].strip("[]") if ":" in address else address


def mark_of(listing: Sequence[object]) -> bytes:
    """Bytes that tell this listing from others. To remember 65,000 endpoints as they came would take 40 MB.

    Returns: b"" for one that is nested so deeply that it cannot be told from others.
    """
    digest = hashlib.blake2b(digest_size=32)
    try:
        for start in range(0, len(listing), _SLICE):  # so that no call holds the interpreter for long
            part = listing[start : start + _SLICE]
            try:
                digest.update(msgspec.json.encode(part))
            except ValueError:  # half a surrogate pair somewhere; json knows a way to write it
                digest.update(json.dumps(part).encode("ascii"))
    except RecursionError:
        return b""
    return digest.digest()


_SLICE: Final = 1000
