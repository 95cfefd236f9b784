"""An exported directory loads in a process that has torch and transformers, and not this package."""

import ast
import json
import shutil
import site
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import TOP_P, tiny_model, token_ids
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import hmoe_megatron.hf
from hmoe_megatron.hf.architectures import Native
from hmoe_megatron.hf.model_settings import AUTO_MAP

CODE = [Path(hmoe_megatron.hf.__path__[0], name) for name in Native.code]
# site-packages by hand: -S leaves out its .pth files, one of which is this package's editable install.
SCRIPT = """
import importlib.util, json, sys
sys.path.append(sys.argv[1])
assert importlib.util.find_spec("hmoe_megatron") is None
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(1)
directory, tuned = sys.argv[2:4]
model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=True)
base = AutoModel.from_pretrained(directory, trust_remote_code=True)
prompt = tokenizer("w3 w9 w27", return_tensors="pt")
text = tokenizer.decode(model.generate(**prompt, max_new_tokens=12, do_sample=False)[0])
ids = torch.tensor(json.loads(sys.argv[4]))
logits = model(ids).logits
loss = model(ids, labels=ids).loss
loss.backward()
torch.optim.SGD(model.parameters(), lr=0.1).step()
after = model(ids, labels=ids).loss
model.save_pretrained(tuned)
again = AutoModelForCausalLM.from_pretrained(tuned, trust_remote_code=True)
assert torch.equal(again(ids).logits, model(ids).logits)
assert not [name for name in sys.modules if name.startswith("hmoe_megatron")]
told = {"text": text, "logits": logits.tolist(), "losses": [float(loss), float(after)]}
print(json.dumps({**told, "base": type(base).__name__, "module": type(model).__module__}))
"""


@pytest.fixture
def exported(tmp_path):
    """(directory, its model): config with auto_map, weights, code, tokenizer."""
    directory = tmp_path / "exported"
    model = tiny_model(**TOP_P)
    model.save_pretrained(directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "auto_map": AUTO_MAP}))
    for path in CODE:
        shutil.copy(path, directory)
    words = Tokenizer(models.WordLevel({f"w{index}": index for index in range(64)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(directory)
    return directory, model


def test_a_process_without_this_package_loads_generates_and_fine_tunes(exported, tmp_path):
    directory, model = exported
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    ids_BS = token_ids()
    packages = next(path for path in site.getsitepackages() if Path(path, "transformers").is_dir())
    arguments = [packages, str(directory), str(tmp_path / "tuned"), json.dumps(ids_BS.tolist())]
    env = {"PATH": "/usr/bin:/bin", "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", SCRIPT, *arguments], cwd=elsewhere, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["module"].startswith("transformers_modules.") and told["base"] == "HMoEModel"
    with torch.no_grad():
        torch.testing.assert_close(torch.tensor(told["logits"]), model(ids_BS).logits, rtol=0, atol=1e-6)
        expected = model.generate(torch.tensor([[3, 9, 27]]), max_new_tokens=12, do_sample=False, pad_token_id=0)[0]
    assert told["text"].split() == [f"w{index}" for index in expected.tolist()]
    assert told["losses"][1] < told["losses"][0]
    for path in CODE:
        assert (tmp_path / "tuned" / path.name).read_text() == path.read_text()


def test_code_without_consent_is_not_run(exported):
    from transformers import AutoModelForCausalLM

    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForCausalLM.from_pretrained(exported[0], trust_remote_code=False)


ALLOWED = {
    "hmoe_layer.py": {"torch", "math", "collections", "dataclasses"},
    "configuration_hmoe.py": {"transformers", ".hmoe_layer"},
    "modeling_hmoe.py": {"torch", "transformers", ".configuration_hmoe", ".hmoe_layer"},
}


@pytest.mark.parametrize("path", CODE, ids=lambda path: path.name)
def test_code_imports_torch_transformers_and_itself(path):
    """The layer torch alone. The model names each file itself: not every transformers looks for the files of a file."""
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add("." * node.level + node.module if node.level else node.module.split(".")[0])
    assert imported == ALLOWED[path.name]
