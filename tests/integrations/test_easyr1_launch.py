"""The launcher, the driver and the worker, around stand-ins with EasyR1's recorded names."""

import functools
import importlib
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from integrations.recorded import standin

from roma.integrations.easyr1 import launch
from roma.integrations.easyr1.actor import ViewTerms
from roma.integrations.easyr1.driver import CorrectnessTrainer, RewardMemory
from roma.integrations.options import RomaOptions

OPTIONS = RomaOptions(num_views=2)


class Worker:
    """Of EasyR1's base of workers what matters: made without arguments."""

    def __init__(self, cuda_visible_devices=None):
        self.made = True


def dispatched(function):
    function.attrs_of_dispatch = "to all"
    return function


class FSDPWorker(Worker):
    def __init__(self, config, role):
        super().__init__()
        self.config, self.role = config, role
        self._has_actor = role == "actor_rollout_ref"

    @dispatched
    def init_model(self):
        self.processor = self.config.processor
        from verl.workers.actor.dp_actor import DataParallelPPOActor

        if self._has_actor:
            self.actor = DataParallelPPOActor(
                config=self.config.actor, actor_module="model", actor_optimizer="optimizer"
            )
            self.ref_policy = DataParallelPPOActor(config=self.config.ref, actor_module="reference")

    @dispatched
    def update_actor(self, data):
        return self.actor.update_policy(data)


class RayPPOTrainer:
    def __init__(self, config, reward_fn, group):
        self.config, self.reward_fn, self.group = config, reward_fn, group

    def init_workers(self):
        self.actor_rollout_ref_wg = self.group

    def fit(self):
        """Scores each half as a batch of its own, filters, reorders, updates: as with filtering."""
        self.global_step = 7
        for half in self.config.halves:
            self.config.refs.append(self.reward_fn.compute_reward.remote(half))
        return self.actor_rollout_ref_wg.update_actor(self.config.batch)


class AutoRewardManager:
    def compute_reward(self, data):
        raise NotImplementedError


@pytest.fixture
def modules(monkeypatch):
    """EasyR1's modules, as far as they are taken from."""
    names = ["verl", "verl.trainer", "verl.workers", "verl.workers.actor"]
    names += ["verl.trainer.main", "verl.workers.fsdp_workers", "verl.workers.actor.dp_actor"]
    made = {name: ModuleType(name) for name in names}
    made["verl"].__version__ = "0.3.3.dev0"
    made["verl.workers.actor.dp_actor"].DataParallelPPOActor = standin.DataParallelPPOActor
    workers = made["verl.workers.fsdp_workers"]
    workers.FSDPWorker, workers.Worker = FSDPWorker, Worker
    workers.DataProto = standin.DataProto
    main = made["verl.trainer.main"]
    main.FSDPWorker, main.RayPPOTrainer = FSDPWorker, RayPPOTrainer
    main.AutoRewardManager = AutoRewardManager
    for name, module in made.items():
        module.__path__ = []
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "roma.integrations.easyr1.worker", raising=False)
    return made


class Reference:
    """Ray's promise of a value."""

    def __init__(self, value):
        self.value = value


@pytest.fixture
def ray(monkeypatch):
    module = ModuleType("ray")
    module.get = lambda reference: reference.value

    def remote(**resources):
        def of(cls):
            handle = SimpleNamespace(cls=cls, resources=resources)
            handle.remote = lambda *args: cls(*args)
            return handle

        return of

    module.remote = remote
    monkeypatch.setitem(sys.modules, "ray", module)
    return module


class TestOptions:
    def test_ours_and_theirs(self, monkeypatch):
        monkeypatch.setenv("ROMA_OPTIONS", "num_views=3,lambda_inv=2")
        given = [
            "config=a.yaml",
            "roma.lambda_inv=4",
            "trainer.max_steps=1",
            "roma.view_pool=extra",
        ]
        options, rest = launch.options_of(given)
        assert rest == ["config=a.yaml", "trainer.max_steps=1"]
        assert (options.num_views, options.lambda_inv, options.view_pool) == (3, 4.0, "extra")

    @pytest.mark.parametrize(
        ("argument", "said"),
        [
            ("roma.views=2", "got 'views'; correct the name"),
            ("roma.num_views=two", "num_views: expected a whole number"),
            ("roma.num_views", "expected name=value pairs"),
            ("roma.lambda_inv=-1", "lambda_inv: expected"),
        ],
    )
    def test_refuses(self, argument, said):
        with pytest.raises(ValueError, match=said):
            launch.options_of([argument])


class TestMain:
    @pytest.fixture(autouse=True)
    def arguments(self, monkeypatch):
        monkeypatch.setattr(sys, "argv", ["roma"])

    def test_switched_off_nothing_is_replaced(self, modules):
        main = modules["verl.trainer.main"]
        main.Runner, seen = object(), []
        main.main = lambda: seen.append(list(sys.argv))
        stock = dict(vars(main))
        assert launch.main(["a.b=c", "roma.num_views=0"]) == 0
        assert seen == [["roma", "a.b=c"]]
        assert all(vars(main)[name] is value for name, value in stock.items())

    def test_the_runner_gets_the_options_and_replaces(self, modules, ray):
        main = modules["verl.trainer.main"]
        seen = {}

        class Runner:
            def run(self, config):
                from verl.trainer import main as here

                seen.update(worker=here.FSDPWorker, trainer=here.RayPPOTrainer, config=config)

        # In the process of a runner the module is imported anew, with the stock runner in it.
        stock = SimpleNamespace(__ray_actor_class__=Runner)
        main.Runner = stock
        config = SimpleNamespace(worker=SimpleNamespace(actor=standin.config()))

        def theirs():
            runner, main.Runner = main.Runner.remote(), stock
            runner.run(config)

        main.main = theirs
        sys.modules["verl.trainer"].main = main
        launch.main(["roma.lambda_inv=4", "a.b=c"])
        assert main.Runner is stock and sys.argv == ["roma"]  # as they were
        assert config.worker.actor.roma_options == RomaOptions(lambda_inv=4)
        assert seen["worker"].__name__ == "RomaWorker" and issubclass(seen["worker"], FSDPWorker)
        assert seen["trainer"].__mro__[1:3] == (CorrectnessTrainer, RayPPOTrainer)

    def test_a_name_that_is_gone(self, modules, ray):
        modules["verl.trainer.main"].main = None
        with pytest.raises(ValueError, match=r"expected the name Runner, got none; use EasyR1 at"):
            launch.main([])

    def test_another_verl(self, modules):
        modules["verl"].__version__ = "0.9.1"
        with pytest.raises(
            ValueError, match=r"the package verl: expected EasyR1's, .* got 0\.9\.1"
        ):
            launch.main([])

    def test_no_easyr1(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "verl", None)  # as if it were not installed
        with pytest.raises(ImportError, match="verl: expected it to be installed"):
            launch.main([])


class TestWorker:
    @pytest.fixture
    def worker(self, modules):
        return importlib.import_module("roma.integrations.easyr1.worker")

    def made(self, worker, role="actor_rollout_ref", options=OPTIONS):
        actor = standin.config(roma_options=options)
        processor = SimpleNamespace(image_processor=standin.image_processor())
        config = SimpleNamespace(actor=actor, ref=SimpleNamespace(), processor=processor)
        made = worker.RomaWorker(config, role)
        made.init_model()
        return made

    def test_its_policy_has_views_and_its_reference_has_not(self, worker):
        made = self.made(worker)
        assert isinstance(made.actor, ViewTerms)
        assert isinstance(made.actor, standin.DataParallelPPOActor)
        assert made.actor.maker.options == OPTIONS
        assert made.ref_policy.maker is None
        assert made.actor.actor_module == "model" and made.actor.actor_optimizer == "optimizer"

    def test_switched_off(self, worker):
        assert self.made(worker, options=RomaOptions(num_views=0)).actor.maker is None

    def test_the_actor_is_put_back(self, worker, modules):
        self.made(worker)
        actor = modules["verl.workers.actor.dp_actor"].DataParallelPPOActor
        assert actor is standin.DataParallelPPOActor

    def test_a_critic_has_no_actor(self, worker):
        assert not hasattr(self.made(worker, role="critic"), "actor")

    def test_its_process_can_be_shared(self, worker):
        """EasyR1 derives the class of a process from `cls.__base__` and makes it with nothing."""

        class Process(worker.RomaWorker.__base__):
            def __init__(self):
                super().__init__()

        assert Process().made
        assert not issubclass(Process, FSDPWorker)

    def test_methods_keep_how_they_are_dispatched(self, worker):
        for name in ("init_model", "update_actor"):
            assert getattr(worker.RomaWorker, name).attrs_of_dispatch == "to all"

    def test_another_actor_all_the_same(self, worker, monkeypatch):
        def early(self):  # as if the class had been imported before
            self.processor = self.config.processor
            self.actor = standin.DataParallelPPOActor(self.config.actor, "model")

        monkeypatch.setattr(FSDPWorker, "init_model", early)
        with pytest.raises(ValueError, match="expected a RomaActor, got DataParallelPPOActor"):
            self.made(worker)

    def test_another_signature(self, modules):
        class Actor(standin.DataParallelPPOActor):
            def _forward_micro_batch(self, batch, temperature):
                return None

        modules["verl.workers.actor.dp_actor"].DataParallelPPOActor = Actor
        with pytest.raises(
            ValueError, match=r"Actor\._forward_micro_batch: .* missing: micro_batch"
        ):
            importlib.import_module("roma.integrations.easyr1.worker")


class Handle:
    """Of a reward manager: the accuracy of a completion is its first token's parity."""

    def __init__(self, part="accuracy"):
        self.part = part
        self.compute_reward = self

    def remote(self, data):
        first = data.batch["responses"][:, 0].tolist()
        return Reference((None, {"overall": first, self.part: [t % 2 for t in first]}))


def proto(responses, ids, mask=None):
    responses = torch.tensor(responses)
    mask = torch.ones_like(responses) if mask is None else torch.tensor(mask)
    uid = np.array(list(ids), dtype=object)
    return standin.DataProto.from_dict(
        {"responses": responses, "response_mask": mask}, {"uid": uid}
    )


class TestRewards:
    get = staticmethod(lambda reference: reference.value)

    def test_by_prompt_and_completion_whatever_the_order(self):
        memory = RewardMemory(Handle(), self.get)
        assert memory.compute_reward.remote(proto([[1, 5], [2, 5]], "ab")).value[1]["overall"]
        memory.compute_reward.remote(proto([[3, 5], [4, 5]], "ab"))
        found = memory.accuracies(proto([[4, 5], [1, 5], [2, 5]], "bab"))
        assert found.tolist() == [0, 1, 0]

    def test_what_is_masked_does_not_count(self):
        memory = RewardMemory(Handle(), self.get)
        memory.compute_reward.remote(proto([[1, 9]], "a", [[1, 0]]))
        assert memory.accuracies(proto([[1, 8]], "a", [[1, 0]])).tolist() == [1]

    def test_a_rollout_that_was_not_scored(self):
        memory = RewardMemory(Handle(), self.get)
        memory.compute_reward.remote(proto([[1, 5]], "a"))
        with pytest.raises(ValueError, match="expected every rollout scored, got 1 that were not"):
            memory.accuracies(proto([[1, 5], [1, 5]], "ab"))

    def test_it_forgets(self):
        memory = RewardMemory(Handle(), self.get)
        memory.compute_reward.remote(proto([[1, 5]], "a"))
        memory.accuracies(proto([[1, 5]], "a"))
        with pytest.raises(ValueError, match="1 that were not"):
            memory.accuracies(proto([[1, 5]], "a"))

    def test_a_reward_without_accuracy(self):
        memory = RewardMemory(Handle("score"), self.get)
        memory.compute_reward.remote(proto([[1, 5]], "a"))
        with pytest.raises(
            ValueError, match="part called 'accuracy', got overall, score; return it"
        ):
            memory.accuracies(proto([[1, 5]], "a"))

    def test_the_trainer_tells_the_workers(self, ray):
        halves = [proto([[1, 5], [2, 5]], "ab"), proto([[3, 5], [4, 5]], "ab")]
        batch = proto([[3, 5], [2, 5]], "ab")
        config = SimpleNamespace(halves=halves, batch=batch, refs=[])
        config.worker = SimpleNamespace(actor=SimpleNamespace(roma_options=OPTIONS))
        got = []
        group = SimpleNamespace(update_actor=functools.partial(lambda b: got.append(b) or "done"))
        trainer = type("RomaTrainer", (CorrectnessTrainer, RayPPOTrainer), {})(
            config, Handle(), group
        )
        trainer.init_workers()
        assert trainer.fit() == "done"
        assert got[0].batch["roma_correct"].tolist() == [True, False]
        assert got[0].batch["roma_correct"].dtype == torch.bool
        assert got[0].meta_info["roma_step"] == 7
        assert all(r.value[1]["overall"] for r in config.refs)  # theirs, as they came
