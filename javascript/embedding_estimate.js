// What Gradio can't do: the webui's own progress display, finding a run again after the page was closed, counting the
// tokens once typing has stopped, looking for a run that was stopped, and putting a name into the prompt of another
// tab. Touches nothing but elements of ours and the prompt it is asked to fill.

const embeddingEstimateTask = "embedding_estimate_task_id";
let embeddingEstimateLeaving = false;
window.addEventListener("beforeunload", () => {
    embeddingEstimateLeaving = true;
});

function embeddingEstimateFollow(id, patience) {
    const bar = gradioApp().getElementById("embedding_estimate_progress");
    const preview = gradioApp().getElementById("embedding_estimate_preview");
    const results = gradioApp().getElementById("embedding_estimate_results").classList;
    const atEnd = () => {
        // The page gives up its requests when it is closed, though the run goes on; and the end of a run may be
        // noticed when the next one has begun already.
        if (embeddingEstimateLeaving || ![id, null].includes(localGet(embeddingEstimateTask))) {
            return;
        }
        localRemove(embeddingEstimateTask);
        results.remove("running");
    };
    results.add("running"); // pales what is still there of the run before
    requestProgress(id, bar, preview, atEnd, null, patience);
    return id;
}

function embeddingEstimateSubmit(...values) {
    const id = randomId();
    embeddingEstimateRestoring = true; // nothing older is to be shown any more
    localSet(embeddingEstimateTask, id);
    embeddingEstimateFollow(id, 40);
    values[0] = id;
    return values;
}

let embeddingEstimateRestoring = false;

function embeddingEstimateRestore() {
    embeddingEstimateRestoring = true;
    const id = localGet(embeddingEstimateTask);
    return id ? embeddingEstimateFollow(id, 0) : "";
}

let embeddingEstimateLooked = false;

function embeddingEstimateLook() {
    embeddingEstimateLooked = true;
    return [];
}

function embeddingEstimateSend(name, tab, negative) {
    const field = gradioApp().querySelector(`#${tab}_${negative ? "neg_prompt" : "prompt"} textarea`);
    if (!name || !field) {
        return;
    }
    field.value = field.value.trim() ? `${field.value.trimEnd()}, ${name}` : name;
    updateInput(field);
    const open = {txt2img: "switch_to_txt2img", img2img: "switch_to_img2img"}[tab];
    if (typeof window[open] === "function") {
        window[open]();
    }
}

function embeddingEstimateCount(name) {
    let waiting = 0;
    gradioApp().querySelector(`#embedding_estimate_${name} textarea`)?.addEventListener("input", () => {
        clearTimeout(waiting);
        waiting = setTimeout(() => gradioApp().getElementById(`embedding_estimate_${name}_count`)?.click(), 500);
    });
}

if (typeof onUiLoaded === "function") {
    onUiLoaded(() => {
        ["prompt", "negative"].forEach(embeddingEstimateCount);
        const looking = setInterval(() => { // as below
            if (embeddingEstimateLooked) {
                clearInterval(looking);
            } else {
                gradioApp().getElementById("embedding_estimate_stopped_look")?.click();
            }
        }, 300);
        if (!localGet(embeddingEstimateTask)) {
            return;
        }
        const asking = setInterval(() => { // Gradio hears no click for a while after the page is there
            if (embeddingEstimateRestoring || !localGet(embeddingEstimateTask)) {
                clearInterval(asking);
            } else {
                gradioApp().getElementById("embedding_estimate_restore")?.click();
            }
        }, 300);
    });
}
