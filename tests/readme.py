"""The parameter tables of README.md and README_ja.md, made from the request's own fields.

python -m tests.readme        # writes both tables anew
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from lib_estimate.interfaces import cli
from lib_estimate.request import EstimateRequest, ModelOptions

ROOT = Path(__file__).parents[1]
START, END = "<!-- parameters: written by python -m tests.readme -->", "<!-- end of parameters -->"
HEADINGS = {
    "README.md": "| Flag | Default | Range or choices | What it does |",
    "README_ja.md": "| フラグ | 既定値 | 範囲・選択肢 | 説明 |",
}
JAPANESE = {
    "model": "diffusers フォルダ、または .safetensors / .ckpt ファイル (Stable Diffusion 1, 2, XL 系)。複数回指定すると、それらすべてに使える一つの埋め込みになる",
    "device": "計算する場所: auto, cpu, cuda, cuda:1, mps",
    "dtype": "モデルの重みの数値形式。auto は GPU で float16、CPU で float32",
    "offload": "GPU が必要としない間、何をメインメモリーで待たせるか。off: 何も待たせない。networks: テキストエンコーダー、U-Net、VAE が順番に GPU を使う。blocks: U-Net もブロックごとに GPU を通る。遅いが最も少なくて済む。auto: このうち、空いているメモリーに収まる最初のもの",
    "emphasis": "(word:1.4) の適用方法。webui の設定と同じ",
    "clip_skip": "テキストエンコーダーのどの層を読むか (最後から数える。Stable Diffusion 1)",
    "sdxl_clip_l_skip": "clip skip を SDXL の一つ目のテキストエンコーダーにも適用する",
    "prompt": "推定するプロンプト。強調を含めて書く: a (red:1.6) circle",
    "name": "埋め込みの名前。プロンプトで使う単語であり、ファイル名でもある",
    "negative": "ネガティブプロンプト",
    "target": "二つのうちどちらを埋め込みにするか。both: 一度の記録から両方を作る。二つ目の名前には -neg が付く",
    "stages": "AND や編集のあるプロンプトのテキストごとに埋め込みを一つ作る: name-1, name-2 など。書くべきプロンプトも示す",
    "beside": "ネガティブプロンプトと一緒に使う、ほかのプロンプト。それぞれの隣で学習する。prompt も含めて四つより少なければ、普通のものが加わる",
    "take_over_lora": "タグがプロンプトにある LoRA を、目標を作る間だけ効かせ、単語を学習する間は効かせない。テキストにできる範囲で、単語が LoRA の効果を引き受ける。webui のみ",
    "part": "何を一致させるか。auto: 最も良い方法を自動で選ぶ。cross-attention: U-Net の cross-attention 層でテキストがもたらす出力。速い。unet: 予測されるノイズ。遅いが正確。transformer: テキストエンコーダーの隠れ状態だけ。速いが強調は運べない",
    "effort": "part auto の記録と学習にかけてよい計算量。quick: 画像 3 枚分、normal: 10 枚分、best: 75 枚分",
    "use": "単語をどこで使うか。anywhere: いろいろなプロンプトの中で。whole: プロンプト全体、またはネガティブプロンプト全体として。sentence: 指定した文の中で",
    "sentence": "--use sentence のとき: 単語の位置を {} で示した文。例: a photo of {}, by night。複数回指定できる",
    "vectors": "ベクトル数。init_text: 初期テキストのトークン数、または続きから学習する埋め込みのベクトル数と同じ。auto: 誤差が tolerance 以下に収まる最小の数",
    "tolerance": "vectors が auto のときに許す誤差",
    "init": "ベクトルの出発点となるテキスト。埋め込みの名前を含んでもよい。空欄: プロンプトそのもの",
    "continue_from": "テキストの代わりに出発点とする既存の埋め込み。ファイル、または埋め込みのフォルダにあるものの名前。ベクトルが足りなければ何も変えないもので埋め、多ければ切り捨てる。ステップ数は引き継ぐ。空欄: なし",
    "start": "初期値の作り方。text: トークンごとに使い、多ければ切り捨てる。足りなければ、指定したテキストの後は 0 で、プロンプトそのものの後は何も変えないもので埋める。pooled: テキストをベクトル数に区切り、各区間の平均を使う。random: 実際のトークンと同じ大きさのノイズ",
    "steps": "学習ステップの上限。誤差が下がらなくなれば早く終わる。0: part による",
    "learning_rate": "学習率。0.005:100, 1e-3:1000, 1e-5 (そのステップまでの率) のようにも書ける。空欄: part と optimizer による",
    "schedule": "学習率がその後どう変わるか。auto: part による",
    "warmup": "学習率を 0 から上げるステップ数",
    "optimizer": "オプティマイザー。auto: part による",
    "loss": "学習中に目標との距離を測る方法",
    "batch": "part unet の学習 1 ステップあたりのノイズ付き latent の数。LBFGS は 12 以上",
    "queries": "cross-attention が latent ごとに見る位置の数",
    "memory": "それと auto のスケッチに使ってよいメモリー (GB)",
    "clip_gradient": "勾配ノルムの上限。0: 制限なし",
    "ema": "ベクトルの移動平均で古い値が占める割合 (例 0.95)。0: 使わない",
    "patience": "誤差が小さくならない測定がこの回数続いたら学習を止める。0: 止めない",
    "seed": "すべてのノイズのシード。同じシードで同じ結果になる",
    "sampling_steps": "学習に使う生成のサンプリングステップ数",
    "cfg_scale": "その生成の CFG スケール",
    "width": "その生成の幅 (ピクセル)。0: モデル本来の大きさ",
    "height": "その生成の高さ (ピクセル)。0: モデル本来の大きさ",
    "trajectories": "いくつの生成から学習するか。それぞれ別のノイズから始まる。0: part による",
    "images": "比較のために、プロンプト、埋め込み、重みなしのプロンプトのそれぞれで作る画像の数。0: 作らない",
    "out": "埋め込みのフォルダ",
    "subfolder": "新しいファイルを置く、その中のフォルダ。空欄: なし",
    "format": "ファイル形式。auto: どの webui でも読める pt、SDXL では safetensors",
    "overwrite": "同じ名前の埋め込みファイルを置き換える",
    "checkpoint_every": "プロセスが落ちたときのために、この学習ステップ数ごとに途中の状態をファイルの隣に保存する。終われば消える。0: 保存しない。一度に複数の単語を作るときは保存しない",
    "resume": "同じ名前の中断された実行の続きから、中断がなかった場合と同じベクトルまで進める。なければ初めから",
}


def table(readme: str) -> str:
    rows = [HEADINGS[readme], "|---|---|---|---|"]
    for source in (ModelOptions, EstimateRequest):
        for item in dataclasses.fields(source):
            flag = (
                "PROMPT"
                if item.name == "prompt"
                else cli.SHORT_FLAGS.get(item.name, "--" + item.name.replace("_", "-"))
            )
            default = getattr(item.default, "value", item.default)
            help = item.metadata["help"] if readme == "README.md" else JAPANESE[item.name]
            shown = "" if default is False or default in ("", ()) else f"`{default}`"
            rows.append(f"| `{flag}` | {shown} | {_range(item)} | {help} |")
    return "\n".join(rows)


def _range(item: dataclasses.Field) -> str:
    low, high, choices = (item.metadata[key] for key in ("low", "high", "choices"))
    if low is None:
        numbers = []
    elif high is None:
        numbers = [f"{low} or more"]
    else:
        numbers = [f"{low:g} to {high:g}" if isinstance(item.default, float) else f"{low} to {high}"]
    return ", ".join([f"`{choice}`" for choice in choices or ()] + numbers)


def with_table(text: str, readme: str) -> str:
    """The README's text with its table made anew."""
    pattern = re.compile(re.escape(START) + ".*?" + re.escape(END), re.DOTALL)
    return pattern.sub(lambda _: f"{START}\n{table(readme)}\n{END}", text)


def main() -> None:
    for readme in HEADINGS:
        path = ROOT / readme
        path.write_text(with_table(path.read_text(encoding="utf-8"), readme), encoding="utf-8")


if __name__ == "__main__":
    main()
